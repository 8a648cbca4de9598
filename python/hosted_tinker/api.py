"""`python -m hosted_tinker.api --base-model … --backend … --backend-config '{…}'`: the same as `hosted-tinker serve`."""

import sys

from hosted_tinker.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
