"""Whether an HTTP service answers: `healthy.py URL`, for health checks in an image without curl."""

import sys
import urllib.request

urllib.request.urlopen(sys.argv[1], timeout=5).close()
