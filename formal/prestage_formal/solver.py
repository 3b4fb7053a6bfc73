"""Bitwuzla as a program: SMT-LIB on standard input, answers on standard output.

PyPI has Bitwuzla as a Python module only; yosys-smtbmc starts a program of that name.
"""

import sys

__all__ = ["main"]


def main(arguments=None):
    """Answer what standard input asks."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments:
        # yosys-smtbmc tells the versions of Bitwuzla apart by this word.
        print("usage: bitwuzla --lang smt2")
        return 0
    import bitwuzla

    options = bitwuzla.Options()
    options.set(bitwuzla.Option.PRODUCE_MODELS, True)
    parser = bitwuzla.Parser(bitwuzla.TermManager(), options)
    # The module reads this name as standard input, line by line.
    parser.parse("<stdin>")
    return 0


if __name__ == "__main__":
    sys.exit(main())
