"""python -m foreword"""

from .cli import main

main()
