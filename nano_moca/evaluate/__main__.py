"""`python -m nano_moca.evaluate`: see command.py."""

from nano_moca.evaluate.command import main
from nano_moca.flags import main_guard

if __name__ == "__main__":
    main_guard(main)
