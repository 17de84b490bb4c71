"""Where a sentence of a document ends."""

import re

# After a full stop comes a blank or a closing bracket or quote; Chinese and Japanese ones need neither.
SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+|(?<=[。！？])|\n\s*\n""")
