"""No positions (NoPE, Kazemnejad et al. 2023, arXiv:2305.19466): the causal mask is the only source of order."""

from typing import Any

from .position_base_longembed import PositionScheme, register_scheme


@register_scheme
class NoPositions(PositionScheme):
    """No position embeddings, rotations or biases."""

    type = "none"

    def check(self, config: Any) -> None:
        """Check that there is a causal mask; without one the order of the words would be lost.

        Raises:
            ValueError: there is no causal mask.
        """
        if not config.is_causal:
            raise ValueError(
                "position_embedding_type='none' leaves the causal mask as the only order, and without it word order is "
                "lost; set is_causal=true or choose a position scheme"
            )
