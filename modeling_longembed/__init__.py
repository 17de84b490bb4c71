"""longembed: long-document embedding models. Importing this package registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from .configuration_longembed import LongEmbedConfig
from .modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel

AutoConfig.register("longembed", LongEmbedConfig, exist_ok=True)
AutoModel.register(LongEmbedConfig, LongEmbedModel, exist_ok=True)
AutoModelForMaskedLM.register(LongEmbedConfig, LongEmbedForMaskedLM, exist_ok=True)

__all__ = ["LongEmbedConfig", "LongEmbedForMaskedLM", "LongEmbedModel"]
__version__ = "0.1.0"
