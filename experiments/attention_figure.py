"""A picture of what each attention pattern sees: docs/images/attention_patterns.png.

    python experiments/attention_figure.py --output docs/images/attention_patterns.png

Every panel is the matrix of weights of the dense definition in a tiny random model, row by row the tokens of one
document and what each of them sees: dark by both heads, light by one of the two.
"""

from dataclasses import dataclass, field
from io import BytesIO

import matplotlib

matplotlib.use("Agg")  # a script draws into a file; it needs no display
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from common.arguments import parse
from common.errors import run
from common.files import atomic_write
from common.patterns import parse_pattern
from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.pattern_adaptive_span_longembed import AdaptiveSpan

TOKENS = 32
# Parameters so small that they show in 32 tokens.
PATTERNS = (
    "full",
    "sliding:window=4",
    "sliding:window=4,global_tokens=1",
    "sliding:window=3,dilation=2",
    "block:size=8",
    "shifted:size=8",
    "shifted:size=8,wrap=true",
    "adaptive:max_span=9,ramp=3",
    "memory:size=8,memory=4",
    "landmark:size=5,top_k=1",
    "focused:size=8,top_k=3",
    "lsh:chunk=4,hashes=2",
)


def seen(text: str) -> Tensor:
    """Share of the heads under which a token (row) has weight on another (column): `(TOKENS, TOKENS)`, 0 to 1."""
    torch.manual_seed(0)
    config = LongEmbedConfig(
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=32,
        sublayer_pattern="s",
        attention_patterns=parse_pattern(text),
        position_embedding_type="rope",
        initializer_range=0.2,
    )
    model = LongEmbedModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdaptiveSpan):  # as if the two heads had learned different spans
                module.fraction.copy_(torch.tensor([0.2, 1.0]))
        output = model(torch.randint(1, config.vocab_size, (1, TOKENS)), output_attentions=True)
    (weights,) = output.attentions[0]  # (H, TOKENS, TOKENS)
    return (weights > 0).double().mean(0)


def draw() -> bytes:
    """The PNG."""
    figure, axes = plt.subplots(3, 4, figsize=(9, 7.2), layout="constrained")
    for axis, text in zip(axes.flat, PATTERNS, strict=True):
        axis.imshow(seen(text).numpy(), cmap="Blues", vmin=0, vmax=1.2)
        axis.set_title(text.replace(":", "\n") if ":" in text else f"{text}\n", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.supxlabel("is seen")
    figure.supylabel("token")
    image = BytesIO()
    figure.savefig(image, format="png", dpi=110)
    plt.close(figure)
    return image.getvalue()


@dataclass
class Arguments:
    """Where the picture goes."""

    output: str = field(
        default="docs/images/attention_patterns.png", metadata={"help": "the PNG file, written whole or not at all"}
    )


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    atomic_write(arguments.output, draw())
    print(arguments.output)


if __name__ == "__main__":
    run(main)
