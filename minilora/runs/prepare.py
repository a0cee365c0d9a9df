"""From a recipe to what the training loop needs: the model, its tokenizer, the data, the trainable parameters and their optimizer."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from minilora.adapters import METHODS, inject
from minilora.data.batches import Batch
from minilora.data.records import listed, note
from minilora.formats.checkpoint import load_model
from minilora.formats.tokenizer import Tokenizer
from minilora.lora import registry
from minilora.models.stack import Body
from minilora.optim.optimizers import AdamW, create_loraplus_optimizer
from minilora.optim.schedules import schedule
from minilora.runs.recipe import Recipe, ResolvedRecipe
from minilora.runs.run_file import check_task, check_window, published_classes, tokenizer_of
from minilora.runs.tasks import Task, training_task
from minilora.training.loop import train
from minilora.training.prefix import PrefixCache
from minilora.training.reinitialise import reinitialise
from minilora.training.watch import Step

FIRST_BATCHES = 4  # seen by initialisers that read data


def open_recipe(recipe: Recipe) -> tuple[Any, Tokenizer, Task]:
    """The model, its tokenizer and the data, each checked against the others. Raises ValueError when they do not fit."""
    options: dict[str, Any] = {"quantize": recipe.quantize}
    if recipe.kind == "classify":  # the data come first: they have the number of classes of a new head
        tokenizer = tokenizer_of(recipe.model)
        published = published_classes(recipe.model)
        task = training_task(recipe, tokenizer, None if recipe.new_head else published)
        options |= {"labels": task.labels or published, "new_head": recipe.new_head, "seed": recipe.seed}
        if recipe.new_head and published:
            note(f"{recipe.model}: the head for {listed(published, 40)} is replaced by one for {listed(task.labels or (), 40)}.")
    model = load_model(recipe.model, recipe.backend, recipe.dtype, **options)
    check_task(model, recipe.task, recipe.model)
    if recipe.kind != "classify":
        tokenizer = tokenizer_of(recipe.model, model.config.vocab_size)
        task = training_task(recipe, tokenizer)
    check_window(model, recipe.window)
    return model, tokenizer, task


def prepare(model: Any, recipe: ResolvedRecipe, task: Task, config: Any = None) -> AdamW:
    """Make trainable what the method trains. Returns its optimizer. config: of the adapter, by default the recipe's."""

    def first_batches() -> None:
        """Forward and backward on the first training batches, for initialisers that read data."""
        for batch in islice(task.batches(recipe.seed), FIRST_BATCHES):
            model.loss_backward(model.loss(batch.ids, batch.labels, batch.offsets)[1])

    if recipe.reinit is not None:
        reinitialise(model, recipe.reinit, rng=recipe.seed)
    if recipe.method == "full":
        model.unfreeze()
    elif config is not None:
        inject(model, config, rng=recipe.seed)
    elif recipe.method == "lora":
        inject(model, _lora_config(recipe), rng=recipe.seed, train_step=first_batches)
    else:
        options = {"reduction_factor": recipe.reduction_factor} if recipe.method == "bottleneck" else {}
        inject(model, METHODS[recipe.method](**options, modules_to_save=recipe.modules_to_save), rng=recipe.seed)
    for _, layer in model.modules():
        if isinstance(layer, Body):
            layer.recompute = recipe.recompute
    adam: dict[str, Any] = {"lr": recipe.lr, "bias_correction": recipe.bias_correction, "l2_sp": recipe.l2_sp}
    decay, ratio = recipe.weight_decay, recipe.loraplus_lr_ratio
    if ratio is None:
        return AdamW(model.parameters(), weight_decay=decay, **adam)
    return create_loraplus_optimizer(model, AdamW, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, **adam)


def steps_of(
    model: Any, optimizer: AdamW, batches: Iterator[Batch], recipe: ResolvedRecipe, prefix: PrefixCache | None, **options: Any
) -> Iterator[Step]:
    """The steps of a recipe. options: done, loss_scale and norms_every, see `train`."""
    rate = schedule(recipe.schedule, recipe.steps, recipe.warmup)
    options |= {name: getattr(recipe, name) for name in ("clip", "accumulate", "threads", "lanes", "seed")}
    return train(model, optimizer, batches, recipe.steps, rate, prefix=prefix, **options)


def prefix_for(task: Task, recipe: ResolvedRecipe) -> PrefixCache | None:
    """A cache for the outputs of frozen blocks; None where no record is read twice."""
    epoch = task.steps(1, recipe.accumulate, recipe.seed)
    return PrefixCache() if recipe.cache and epoch is not None and recipe.steps > epoch else None


def _lora_config(recipe: ResolvedRecipe) -> Any:
    names = "r target_modules layers_to_transform bias modules_to_save use_dora init_lora_weights use_rslora".split()
    values = {name: getattr(recipe, name) for name in names}
    values["task_type"] = "SEQ_CLS" if recipe.task == "classify" else "CAUSAL_LM"
    if recipe.peft_type == "LORA":
        values |= {"lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout}
    else:
        values["vera_dropout"] = recipe.lora_dropout
    return registry.load(registry.METHODS[recipe.peft_type])(**values)
