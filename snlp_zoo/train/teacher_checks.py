"""Whether a teacher suits its student: asked before anything is trained, of its configuration alone."""

import torch
from transformers import AutoConfig, AutoModel

from snlp_zoo.distill.matching import LAYER_MAPS, layer_pairs, score_projections
from snlp_zoo.distill.objectives import OBJECTIVES
from snlp_zoo.errors import RecipeError
from snlp_zoo.train.parts import TeacherPart
from snlp_zoo.train.recipe import Recipe
from snlp_zoo.train.teacher_source import teacher_from_pretrained, text_config


def check_attention_scores(part: TeacherPart) -> None:
    """Build the teacher without weights and see whether its attention scores can be had.

    Raises:
        RecipeError: they cannot, or there is no such teacher.
    """
    config = teacher_from_pretrained(AutoConfig, part)
    with torch.device("meta"):
        score_projections(AutoModel.from_config(config))


def check_layer_map(recipe: Recipe, student_layers: int) -> None:
    """See whether the teacher has the layers that the recipe's layer map names.

    Raises:
        RecipeError: it has not, or there is no such teacher.
    """
    if recipe.teacher and recipe.layer_map not in LAYER_MAPS:
        layer_pairs(
            student_layers, teacher_from_pretrained(AutoConfig, recipe.teacher).num_hidden_layers, recipe.layer_map
        )


def check_positions(recipe: Recipe) -> None:
    """See whether the teacher reads texts as long as the recipe's may be.

    Raises:
        RecipeError: it does not, or there is no such teacher.
    """
    if recipe.teacher:
        positions = getattr(text_config(recipe.teacher), "max_position_embeddings", recipe.data.max_length)
        if recipe.data.max_length > positions:
            raise RecipeError(
                f"data.max_length {recipe.data.max_length} is more than the teacher's {positions} positions; lower it"
            )


def check_projection(recipe: Recipe, student_width: int) -> None:
    """See whether embedded tokens, which the projection "normed" leaves as they are, can be compared.

    Raises:
        RecipeError: student and teacher differ in width, or there is no such teacher.
    """
    if recipe.teacher and recipe.projection == "normed" and "embedding_mse" in recipe.objectives:
        width = text_config(recipe.teacher).hidden_size
        if width != student_width:
            raise RecipeError(
                f"projection 'normed' leaves embedded tokens as they are, and embedding_mse cannot compare the "
                f"student's width {student_width} with the teacher's {width}; use 'per_layer' or 'shared'"
            )


def check_vocabulary(recipe: Recipe, student_vocabulary: int) -> None:
    """See whether a language model's teacher reads and predicts as many tokens as the student, if both are compared.

    Raises:
        RecipeError: it does not, or there is no such teacher.
    """
    compared = [name for name in recipe.objectives if OBJECTIVES[name].unit == "logit"]
    if not (recipe.teacher and compared):
        return
    teachers = text_config(recipe.teacher).vocab_size
    if teachers != student_vocabulary:
        raise RecipeError(
            f"objectives: {compared[0]} compares predictions over one vocabulary, and the teacher's has {teachers} "
            f"tokens, the student's {student_vocabulary}; set model.config.vocab_size={teachers}"
        )
