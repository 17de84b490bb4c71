"""The ends of sentences in a document."""

import re

# White space must follow a full stop (or the closing bracket or quote after it), but not a Chinese or Japanese one.
SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+|(?<=[。！？])|\n\s*\n""")
