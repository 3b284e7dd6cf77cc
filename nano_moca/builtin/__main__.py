"""`python -m nano_moca.builtin`: make the nano base anew (see base.py)."""

import sys

from nano_moca.builtin.base import make_base
from nano_moca.flags import main_guard

if __name__ == "__main__":
    main_guard(lambda: make_base(sys.argv[1:]))
