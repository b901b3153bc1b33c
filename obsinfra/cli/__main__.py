"""`python -m obsinfra.cli`, and so `torchrun -m obsinfra.cli train`."""

from obsinfra.cli.main import main

if __name__ == "__main__":
    main()
