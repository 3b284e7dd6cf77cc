"""Before a run's first step: what it may touch, what it will need, and where it goes on.

    claims.py    what a run may touch, and that it is alone there
    estimate.py  --plan: memory and time, computed without a GPU and without weights
    resume.py    --resume: going on after a break, on any number of ranks
"""
