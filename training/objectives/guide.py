"""The guide: another model that detects the false negatives of a batch."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.encoders.encoder import Encoder
from common.encoders.model_folder import ModelFolder
from common.errors import UserError


class Guide:
    """A frozen model that embeds the texts of a batch (GISTEmbed, Solatorio 2024, arXiv:2402.16829).

    Args:
        name: a folder or Hub id, of a LongEmbed or a sentence-transformers model.
        batch_tokens: number of tokens of a forward pass.

    Raises:
        UserError: there is no such model, or the packages that load it are not installed.
    """

    def __init__(self, name: str, batch_tokens: int) -> None:
        try:
            self.encoder = Encoder(ModelFolder.find(name), batch_tokens=batch_tokens)
        except UserError as error:
            raise UserError(f"--guide_model {name}: {error}") from None

    def __call__(self, columns: list[list[str]], device: torch.device) -> Tensor:
        """Embed the texts of a batch.

        Args:
            columns: for each column its n texts; the first column holds queries, the others documents.
            device: device of the result.

        Returns:
            `(n, columns, g)` unit vectors.
        """
        vectors = [self.encoder(texts, "document" if number else "query") for number, texts in enumerate(columns)]
        rows = torch.from_numpy(np.stack([np.concatenate(column) for column in vectors], axis=1))
        return F.normalize(rows.float(), dim=-1).to(device)


def load_guide(name: str | None, batch_tokens: int) -> Guide | None:
    """Return the guide that `--guide_model` names; None without that option."""
    return None if name is None else Guide(name, batch_tokens)
