"""Another model that tells which texts of a batch are no negatives."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.encoders import Encoder
from common.errors import UserError
from common.model_folder import ModelFolder


class Guide:
    """The vectors of another model, which does not train (GISTEmbed, Solatorio 2024, arXiv:2402.16829).

    Args:
        name: a folder or Hub id that sentence-transformers or ours can load.
        batch_tokens: token budget of a forward pass.
    """

    def __init__(self, name: str, batch_tokens: int) -> None:
        """Raises:
        UserError: there is no such model, or what loads it is not installed.
        """
        try:
            self.encoder = Encoder(ModelFolder.find(name), batch_tokens=batch_tokens)
        except UserError as error:
            raise UserError(f"--guide_model {name}: {error}") from None

    def __call__(self, columns: list[list[str]], device: torch.device) -> Tensor:
        """Unit vectors of the texts of n rows, queries in the first column: `(n, columns, g)`."""
        vectors = [self.encoder(texts, "document" if number else "query") for number, texts in enumerate(columns)]
        rows = torch.from_numpy(np.stack([np.concatenate(column) for column in vectors], axis=1))
        return F.normalize(rows.float(), dim=-1).to(device)
