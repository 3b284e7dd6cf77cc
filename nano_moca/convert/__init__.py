"""Files of other tools: what they read of ours, and what we read of theirs."""
