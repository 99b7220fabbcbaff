"""Entry of a sweep as a Ray job: `ray job submit --working-dir . -- python jobs/sweep.py quickstart storage=/shared/results`.

Takes what `jmedlora sweep` takes. Submitting it again after a failure goes on where it stands.
"""

import sys

from jmedlora.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "sweep")
    main()
