"""Loading and saving of folders for the Hub: tokenizer, files of sentence-transformers and model card."""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import PreTrainedModel

from .hub_files_longembed import HUB_OPTIONS, SAVED_TOKENIZER_FILES, find_file, load_tokenizer
from .hub_sentence_transformers_longembed import (
    adopt_settings,
    find_saving_sentence_transformer,
    sentence_transformers_files,
    write_json,
)

AUTO_MAP = {
    "AutoConfig": "configuration_longembed.LongEmbedConfig",
    "AutoModel": "modeling_longembed.LongEmbedModel",
    "AutoModelForMaskedLM": "modeling_longembed.LongEmbedForMaskedLM",
}

CARD = """---
{metadata}
---

# {title}

A longembed encoder: one vector{tokens} for a document of up to {context:,} tokens.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{title}", trust_remote_code=True)
documents = model.encode(["a long document ..."], prompt_name="document")
queries = model.encode(["a question"], prompt_name="query")
scores = queries @ documents.T
```

{token_vectors}It loads as well with `SentenceTransformer("{title}", trust_remote_code=True)` and, for a vector a token,
with `MultiVectorEncoder`. Those who `pip install longembed` and `import modeling_longembed` need no remote code with
`AutoModel`.

## The model

| | |
|---|---|
| made from | {base} |
| context | {context:,} tokens |
| vector | {dim} dimensions, pooling {pooling} |
| token vectors | {token_row} |
| positions | `{positions}`{extension} |
| attention patterns | {patterns} |
| layout | `{layout}` |
| parameters | {parameters:,} |

{training}## Results

{results}

## Safety

Weights are safetensors. The code in this repository runs on your machine when you pass `trust_remote_code=True`: pin a
`revision`, read the files, or compare them with these sums.

| file | sha256 |
|---|---|
{sums}
"""

TOKEN_VECTORS = """A vector a token finds more in long documents than one vector; MaxSim compares them:

```python
documents = model.encode(["a long document ..."], prompt_name="document", output_value="tokens")
queries = model.encode(["a question"], prompt_name="query", output_value="tokens")
scores = model.similarity(queries, documents)
```

"""

TRAINING = """## Training

| | |
|---|---|
{rows}

"""

ADAPTER_CARD = """---
{metadata}
---

# {title}

An adapter ({kind}, by peft) of a longembed encoder, and not a model by itself: it needs {base}.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{source}", trust_remote_code=True)
model.load_adapter("{title}")  # or: model = peft.PeftModel.from_pretrained(model, "{title}")
documents = model.encode(["a long document ..."], prompt_name="document")
```
"""


def copy_tokenizer(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer that cuts off the end, as `encode` does, and remembers no call.

    A fast tokenizer keeps the truncation and the padding of its last call: a thread that truncates would cut off what
    another one reads with the same object, and `save_pretrained` would write them.
    """
    copied = copy.deepcopy(tokenizer)
    copied.truncation_side = "right"
    if getattr(copied, "is_fast", False):
        copied.backend_tokenizer.no_truncation()
        copied.backend_tokenizer.no_padding()
    return copied


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def summarize_patterns(entries: list[dict]) -> str:
    """Return the patterns of a config in the order they first appear, such as `4 x block (size 254), 2 x full`."""
    shown = [entry["type"] + "".join(f" ({k} {v})" for k, v in entry.items() if k != "type") for entry in entries]
    return ", ".join(f"{shown.count(name)} x {name}" for name in dict.fromkeys(shown))


def summarize_token_vectors(config) -> str:
    """Return what a config says of token vectors, such as `64 dimensions, head `linear`, query weights `idf``."""
    head = f"{config.token_dim} dimensions, head `{config.token_head}`"
    parts = [f"the {config.hidden_size} dimensions of the states" if config.token_dim is None else head]
    parts += [f"query weights `{config.query_token_weights}`"] if config.query_token_weights != "none" else []
    parts += ["none of punctuation"] if config.token_skip_punctuation else []
    return ", ".join(parts)


def shown_score(score: float) -> str:
    """Return a score with four digits after the point where it is a fraction, and with two where it is times 100."""
    return f"{score:.4f}" if abs(score) <= 1 else f"{score:.2f}"


class HubModel(PreTrainedModel):
    """A model that loads the tokenizer of its own revision, and saves everything that a published folder needs."""

    _tokenizer = None
    _tokenizer_source: dict | None = None
    _encode_tokenizer: tuple | None = None
    # Rows of the table in the model card, `{"task": ..., "metric": ..., "score": ...}`; set them before saving.
    results: Sequence[dict] = ()
    # Likewise the rows of a table about the training, and its data sets on the Hub.
    training_rows: Mapping[str, str] = {}
    datasets: Sequence[str] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as transformers does, and remember the source, so that the tokenizer comes from the same revision."""
        source = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._tokenizer_source = source
        return loaded

    @property
    def tokenizer(self):
        """The tokenizer in the model's folder, loaded at first use; can be set.

        Raises:
            ValueError: none was set, and the model's folder has none.
        """
        if self._tokenizer is None:
            # Pass our config: transformers would load it anew otherwise, and ask whether to trust remote code.
            options = {"config": self.config, **(self._tokenizer_source or {})}
            if self.name_or_path:
                self._tokenizer = load_tokenizer(self.name_or_path, SAVED_TOKENIZER_FILES, **options)
            if self._tokenizer is None:
                raise ValueError("there is no tokenizer beside this model; set model.tokenizer first")
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        self._tokenizer, self._encode_tokenizer = tokenizer, None

    @property
    def encode_tokenizer(self):
        """A copy of the tokenizer for `encode` alone, so that `tokenizer` may be called in other threads meanwhile."""
        tokenizer = self.tokenizer
        # Tokens may have been added to it, or other special tokens around a text.
        around = tokenizer.backend_tokenizer.post_processor if getattr(tokenizer, "is_fast", False) else None
        state = (id(tokenizer), len(tokenizer), around and around.__getstate__())
        found = self._encode_tokenizer
        if found is None or found[0] != state:
            found = self._encode_tokenizer = (state, copy_tokenizer(tokenizer))
        return found[1]

    def set_tokenizer_length(self, length: int):
        """Replace the tokenizer, if there is one, by a copy with this `model_max_length`: a user may share the old."""
        if self.has_tokenizer():
            self.tokenizer = copy_tokenizer(self.tokenizer)
            self.tokenizer.model_max_length = length

    def has_tokenizer(self) -> bool:
        """Return whether a tokenizer was set or is in the model's folder."""
        if self._tokenizer is not None or not self.name_or_path:
            return self._tokenizer is not None
        options = self._tokenizer_source or {}
        return any(find_file(self.name_or_path, file, **options) is not None for file in SAVED_TOKENIZER_FILES)

    def save_pretrained(  # type: ignore[override]  # `title` is an additional option
        self, save_directory, is_main_process: bool = True, title: str | None = None, **kwargs
    ):
        """Save weights, config, code, tokenizer, the files of sentence-transformers, and a model card.

        If peft's adapters are on the model, transformers saves the active adapter alone; beside it goes its card.

        When sentence-transformers saves, it writes the tokenizer, its own files and the card itself, from settings that
        this model does not know: these are left to it, and the config in the folder adopts what it can name of them.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes.
            title: name of the model in the card; None: the name of the folder.
            **kwargs: as in transformers.

        Raises:
            ValueError: layers of peft are in the model, and transformers does not know of them.
            OSError: whether the model has a tokenizer could not be found out; nothing is written then.
        """
        if not self._hf_peft_config_loaded and any(".base_layer." in name for name, _ in self.named_parameters()):
            raise ValueError(
                "layers of peft are in this model, whose weights would not load again; save the PeftModel, or the "
                "model that its merge_and_unload() returns"
            )
        # Register all three classes, so that the folder loads as an encoder and as a masked language model.
        self.config.auto_map = dict(AUTO_MAP)
        saving = find_saving_sentence_transformer(self)
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        writes_companions = is_main_process and is_first and saving is None
        if writes_companions and not self._hf_peft_config_loaded and self.has_tokenizer():
            _ = self.tokenizer  # it may have to be fetched, which fails before anything is written or not at all
        with self._saving_no_code() if self._hf_peft_config_loaded else self._saving_settings_of(saving):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if writes_companions:
            self._write_companions(Path(save_directory), title)

    @contextmanager
    def _saving_settings_of(self, saving: Any | None) -> Iterator[None]:
        """Have a config that adopts the settings of a model of sentence-transformers, if one is saving this model."""
        if saving is None:
            yield
            return
        own = self.config
        self.config = copy.deepcopy(own)
        try:
            adopt_settings(self.config, saving)
            yield
        finally:
            self.config = own

    @contextmanager
    def _saving_no_code(self) -> Iterator[None]:
        """Keep transformers from copying the code of the model: an adapter is loaded onto a model that has it."""
        # Releases of transformers differ in which of the two they read.
        self._auto_class, self.is_remote_code = None, lambda: False  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._auto_class, self.is_remote_code

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        """Replace the generic card that `push_to_hub` of transformers writes before it calls this method."""
        self._write_companions(Path(working_dir), title=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _write_companions(self, folder: Path, title: str | None = None):
        title = title or folder.resolve().name
        if self._hf_peft_config_loaded:
            card = self._adapter_card(title)
        else:
            self._write_tokenizer(folder)
            card = self._card(folder, title)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _write_tokenizer(self, folder: Path, token_vectors: bool = True):
        """Write the tokenizer, and the files with which sentence-transformers loads the folder.

        Args:
            folder: the folder of the model.
            token_vectors: whether the folder holds our code, which gives token vectors.
        """
        if self.has_tokenizer():
            tokenizer = copy_tokenizer(self.tokenizer)
            tokenizer.model_max_length = self.config.max_position_embeddings
            for name in ("is_local", "local_files_only"):  # how it was loaded here is no property of it
                tokenizer.init_kwargs.pop(name, None)
            tokenizer.save_pretrained(folder)
        for name, content in sentence_transformers_files(self.config, token_vectors).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, content)

    def _adapter_card(self, title: str) -> str:
        adapter = self.peft_config[self.active_adapters()[0]]
        kind, base = str(adapter.peft_type.value).lower(), str(adapter.base_model_name_or_path or "")
        metadata = ["library_name: peft", "tags:", "- longembed", f"- {kind}"]
        if base.count("/") == 1 and not Path(base).exists():  # the id of a model on the Hub
            metadata += [f"base_model: {base}", "base_model_relation: adapter"]
        return ADAPTER_CARD.format(
            metadata="\n".join(metadata),
            title=title,
            kind=kind,
            base=f"`{base}`" if base else "the model that it was trained on, which has no name",
            source=base or "the model that it was trained on",
        )

    def _card(self, folder: Path, title: str) -> str:
        config = self.config
        metadata = ["library_name: transformers", "pipeline_tag: sentence-similarity"]
        made_for_tokens = config.token_dim is not None or config.query_token_weights != "none"
        tags = ["longembed", "sentence-transformers", "feature-extraction", "custom_code"]
        tags += ["late-interaction"] if made_for_tokens else []
        metadata += ["tags:", *(f"- {tag}" for tag in tags)]
        metadata += [f"license: {config.license}"] if config.license else []
        base = config.original_model
        metadata += [f"base_model: {base}"] if base and "/" in base else []  # the id of a model on the Hub
        metadata += ["datasets:", *(f"- {name}" for name in self.datasets)] if self.datasets else []
        extension, extended = config.position_extension, ""
        if extension is not None:
            original = extension["original_max_position_embeddings"]
            extended = f", extended by `{extension['method']}` from {original:,} tokens"
        weights = [f"`{config.token_weighting}`"] if config.token_weighting != "none" else []
        weights += ["how rare they are"] if config.token_weighting_power else []
        weighting = f", tokens weighed by {' and '.join(weights)}" if weights else ""
        made = "\n".join(f"| {name} | {value} |" for name, value in self.training_rows.items())
        rows = [f"| {row['task']} | {row['metric']} | {shown_score(row['score'])} |" for row in self.results]
        files = sorted({*folder.glob("*.py"), *folder.glob("*.safetensors")})
        return CARD.format(
            metadata="\n".join(metadata),
            title=title,
            base=f"`{base}`" if base else "random weights",
            tokens=", or a vector a token," if made_for_tokens else "",
            token_vectors=TOKEN_VECTORS if made_for_tokens else "",
            token_row=summarize_token_vectors(config),
            context=config.max_position_embeddings,
            dim=config.hidden_size,
            pooling=f"`{config.pooling}`{weighting}",
            positions=config.position_embedding_type,
            extension=extended,
            patterns=summarize_patterns(config.attention_patterns),
            layout=config.sublayer_pattern,
            parameters=self.num_parameters(),
            training=TRAINING.format(rows=made) if made else "",
            results="\n".join(["| task | metric | score |", "|---|---|---|", *rows])
            if rows
            else "None recorded when this model was saved.",
            sums="\n".join(f"| {path.name} | `{sha256(path)}` |" for path in files),
        )
