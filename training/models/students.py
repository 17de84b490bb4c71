"""The student that a teacher is compressed into: some of its layers, a new model of other sizes, or a given one."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from common.patterns import parse_pattern
from training.models.encoder import ModelArguments, load_encoder
from training.models.identity import tokenizer_identity
from training.models.layer_choice import keep_layers

# Fields of the config that give the size of a new student.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass
class StudentArguments:
    """The student, described in one of three ways: layers of the teacher, sizes, or the name of a model.

    Raises:
        UserError: a size is not positive, or the student is described in more than one way.
    """

    student_layers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "layers of the teacher that make up the student: every_other, ends:3 (three, evenly spaced from "
            "the first to the last), or their numbers counted from 0; default: every_other"
        },
    )
    student_hidden_size: int | None = field(
        default=None, metadata={"help": "width of a new student; the sizes below that are not given are the teacher's"}
    )
    student_num_hidden_layers: int | None = field(default=None, metadata={"help": "attention layers of a new student"})
    student_num_attention_heads: int | None = field(default=None, metadata={"help": "attention heads of a new student"})
    student_intermediate_size: int | None = field(
        default=None,
        metadata={"help": "feed-forward width of a new student; in the teacher's proportion if not given"},
    )
    student_attention_patterns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "attention patterns of a new student, one for all layers or one each; default: the teacher's"
        },
    )
    student_position_embedding_type: str | None = field(
        default=None, metadata={"help": "position scheme of a new student; the teacher's if not given"}
    )
    student_name_or_path: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of the student, a LongEmbed model such as one trained from an assistant"},
    )

    @property
    def fresh(self) -> dict[str, Any]:
        """The options that describe a new student, by their names without `student_`."""
        names = (*SIZES, "attention_patterns", "position_embedding_type")
        return {name: value for name in names if (value := getattr(self, f"student_{name}")) not in (None, [])}

    def __post_init__(self) -> None:
        for name in SIZES:
            if (size := self.fresh.get(name, 1)) < 1:
                raise UserError(f"--student_{name} {size}: must be at least 1")
        given = bool(self.student_layers) + bool(self.fresh) + (self.student_name_or_path is not None)
        if given > 1:
            raise UserError(
                "--student_layers, sizes of a fresh student and --student_name_or_path are three ways to a student; "
                "give one"
            )


def make_student(
    arguments: StudentArguments,
    model_arguments: ModelArguments,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """Return the student, with the teacher's tokenizer.

    Args:
        arguments: which student.
        model_arguments: which teacher, and the dropout of the student.
        teacher: the model that `model_arguments` name.
        tokenizer: its tokenizer.

    Raises:
        UserError: the layers or sizes are impossible, or the student cannot be loaded or has another tokenizer.
    """
    if arguments.student_name_or_path is not None:
        student, own_tokenizer = _given(arguments.student_name_or_path, model_arguments)
        same_tokens(tokenizer, own_tokenizer, arguments.student_name_or_path)
        return student
    try:
        if arguments.fresh:
            student = type(teacher)(_new_config(teacher.config, arguments.fresh | model_arguments.dropouts()))
        else:
            student, _ = load_encoder(model_arguments)
            keep_layers(student, arguments.student_layers, "student_layers")
    except ValueError as error:
        raise UserError(f"the student cannot be made: {error}") from None
    student.tokenizer = tokenizer  # type: ignore[assignment] # a property of ours
    return student


def same_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, name: str) -> None:
    """Check that two models read the same tokens, because relations are between the tokens of a text.

    Args:
        teacher: tokenizer of the teacher.
        student: tokenizer of the student.
        name: of the student, for the error message.

    Raises:
        UserError: the tokenizers differ.
    """
    if tokenizer_identity(teacher) != tokenizer_identity(student):
        raise UserError(
            f"--student_name_or_path {name}: has another tokenizer than the teacher, and relations between tokens can "
            "only be learned token for token; give a student with the teacher's tokenizer, or distil embeddings"
        )


def _given(name: str, model_arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return load_encoder(replace(model_arguments, model_name_or_path=name, model_revision="main"))
    except UserError as error:
        raise UserError(str(error).replace("--model_name_or_path", "--student_name_or_path")) from None


def _new_config(teacher: Any, changes: dict[str, Any]) -> Any:
    """Return the teacher's config with other sizes.

    A new student has no token head and no weights of query tokens: nothing would train the teacher's.
    """
    fields = teacher.to_dict() | changes
    fields |= {"token_dim": None, "token_head": "linear", "query_token_weights": "none"}
    fields["head_dim"] = None
    if "intermediate_size" not in changes:
        fields["intermediate_size"] = fields["hidden_size"] * teacher.intermediate_size // teacher.hidden_size
    layers, of_teacher = fields["num_hidden_layers"], teacher.num_hidden_layers
    if layers != of_teacher:
        fields["sublayer_pattern"] = None
    if layers != of_teacher or "attention_patterns" in changes:
        fields |= {"layer_types": None, "training_attention_patterns": None}
    if "attention_patterns" in changes:
        texts = changes["attention_patterns"]
        fields["attention_patterns"] = [parse_pattern(text, option="student_attention_patterns") for text in texts]
    elif layers != of_teacher:
        spaced = np.linspace(0, of_teacher - 1, layers).round().astype(int)
        fields["attention_patterns"] = [teacher.attention_patterns[number] for number in spaced]
    if fields["position_embedding_type"] != teacher.position_embedding_type:
        fields |= {"position_extension": None, "rope_parameters": None}
    return type(teacher).from_dict(fields)
