"""What a run shows at its end: pictures, and figures on records it never used."""
