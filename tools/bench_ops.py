"""The table of the README's performance section, from a checkout: `snlp-zoo bench`.

python tools/bench_ops.py [--op lif] [--json]
"""

import sys

from snlp_zoo.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
