"""The `disc-train` command.

Exit code 0 if it did what was asked, 1 if the run failed, 2 if the call was wrong, 130 if it was interrupted, 143 if it
was terminated.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `disc-train [CONFIG.yaml] [--flag value ...]`. Errors a user can mend are one line on stderr."""
    # Imported here: torch and transformers take seconds.
    from disc_train.config import parse_arguments
    from disc_train.run import run
    from disc_train.termination import Terminated

    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as exit_:  # argparse has printed its help, or what is wrong
        return int(exit_.code or 0)
    except (ValueError, ImportError) as error:
        return _failed(error, 2)
    try:
        run(*arguments)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except Terminated as ending:
        return _failed(ending, 143)
    return 0


def _failed(error: Exception | str, code: int) -> int:
    print(f"disc-train: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
