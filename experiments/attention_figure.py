"""Draw which tokens each attention pattern sees: the figure of docs/reference/attention-patterns.md.

    python experiments/attention_figure.py --output docs/images/attention_patterns.png

Each panel is the matrix of attention weights of the dense definition in a tiny random model: each row is a token of one
document, each column a token that it may see. Dark: both heads have weight there; light: one of the two.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.arguments import parse
from common.errors import run
from common.patterns import parse_pattern
from eval.report.figures import plt, save_figure
from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.pattern_adaptive_span_longembed import AdaptiveSpan

TOKENS = 32
# The parameters are small enough to be visible in 32 tokens.
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
    """Return the share of the heads in which a token (row) has weight on another (column).

    Args:
        text: a pattern as on the command line.

    Returns:
        `(TOKENS, TOKENS)`, 0 to 1.
    """
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


def draw(path: str) -> None:
    """Draw all patterns into a PNG file."""
    figure, axes = plt.subplots(3, 4, figsize=(9, 7.2), layout="constrained")
    for axis, text in zip(axes.flat, PATTERNS, strict=True):
        axis.imshow(seen(text).numpy(), cmap="Blues", vmin=0, vmax=1.2)
        axis.set_title(text.replace(":", "\n") if ":" in text else f"{text}\n", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.supxlabel("is seen")
    figure.supylabel("token")
    save_figure(figure, path, dpi=110)


@dataclass
class Arguments:
    """Options of the script."""

    output: str = field(
        default="docs/images/attention_patterns.png",
        metadata={
            "help": "the PNG file, written whole or not at all",
            "output": "file",
        },
    )


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    draw(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    run(main)
