"""A causal language model, and its residual streams.

Layer l is the residual stream AFTER block l-1, so that layer 0 is what enters block 0 (the
embedding) and a model of n blocks has the layers 0 … n. It is the index of Hugging Face's
`hidden_states[l]`, except that layer n is taken BEFORE the final norm.
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import json
import logging
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.dynamic_module_utils import (
    get_class_from_dynamic_module,
    get_relative_import_files,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from routesae_cache.gguf import converted
from routesae_cache.hub import hub_errors
from routesae_cache.identity import ModelIdentity, config_hash, weights_hash
from routesae_cache.sources import ModelError, ModelSource, resolve_model

__all__ = [
    "Dtype",
    "LanguageModel",
    "ModelError",
    "ModelIdentity",
    "ModelShape",
    "ModelSource",
    "block_parameters",
    "load_lm",
    "loading",
    "model_shape",
    "pretrained",
    "quiet",
    "resolve_model",
    "with_own_code",
]

logger = logging.getLogger(__name__)

Dtype = Literal["bfloat16", "float32", "float16"]


class _DeepestReached(Exception):
    """Raised from a hook to end a forward pass whose rest is not needed."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model, known from its configuration alone."""

    n_layers: int
    """Blocks; the layers are 0 … n_layers."""
    width: int
    vocab_size: int
    context_limit: int | None
    """The most positions in a row; None where there is no such limit."""


class States(NamedTuple):
    """What one forward pass leaves, short of the logits."""

    residuals: list[Tensor]
    """Of the layers asked for, in the order asked, each (R, T, D)."""
    final_RTD: Tensor
    """What enters the head: the decoder's output, after the final norm."""


class OutputForms(NamedTuple):
    """In what form a model's parts return their output."""

    decoder: type[Any]
    """Class of the decoder's output."""
    extras: list[int | None]
    """For each block what its tuple has besides the residual; None where it returns a tensor."""


class LanguageModel:
    """A causal language model in inference mode, whose residual streams can be read.

    Built by `load_lm`. `model` is the transformers model and `blocks` its decoder blocks.
    """

    def __init__(self, model: Any, identity: ModelIdentity) -> None:
        self.model = model
        self.identity = identity
        self.shape = _shape(model.config)
        self.n_layers = self.shape.n_layers
        self.width = self.shape.width
        self.vocab_size = self.shape.vocab_size
        self.context_limit = self.shape.context_limit
        self.blocks = _decoder_blocks(model, self.n_layers)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' and the residuals' type."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def residuals(self, ids_RT: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The residual streams (R, T, D) at the layers asked for, in the order asked.

        They are inference tensors: no gradient goes through them. Blocks after the last layer
        asked for and the head are not run. Padding at the end of a row needs no mask, for what
        comes later never reaches what comes before. ValueError for a layer beyond the model's.
        """
        self.check_layers(layers)
        return self._read(ids_RT, layers)

    def states(self, ids_RT: Tensor, layers: Sequence[int] = ()) -> States:
        """As `residuals`, and what enters the head, which alone is not run."""
        self.check_layers(layers)
        *residuals, final_RTD = self._read(ids_RT, [*layers, self.n_layers + 1])
        return States(residuals, final_RTD)

    def logits(self, ids_RT: Tensor) -> Tensor:
        """The next-token logits (R, T, V)."""
        with torch.inference_mode():
            output = self.model(ids_RT.to(self.device, torch.long), use_cache=False)
        logits: Tensor = output.logits
        return logits

    def extend(self, ids_RT: Tensor, cache: Any | None = None) -> tuple[Tensor, Any]:
        """The next-token logits (R, V) after more tokens, and the cache with these taken in.

        Args:
            cache: as an earlier call returned it, not to be used again; None for a first call.

        Raises:
            ModelError: if the model keeps no keys and values of earlier tokens.
        """
        known = inspect.signature(self.model.forward).parameters
        if "past_key_values" not in known:
            raise ModelError(
                f"{type(self.model).__name__} keeps no cache of keys and values; expected a model "
                "that does, to continue a text token by token"
            )
        with torch.inference_mode():
            output = self.model(
                ids_RT.to(self.device, torch.long),
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": 1} if "logits_to_keep" in known else {}),
            )
        return output.logits[:, -1], output.past_key_values

    def residuals_behind(
        self, ids_RT: Tensor, layers: Sequence[int], cache: Any | None
    ) -> list[Tensor]:
        """As `residuals`, of tokens that come after those in a cache of `extend`.

        The cache stays as it is: a copy takes the tokens in, for not every kind of cache (sliding
        windows, running states) can be cut back.
        """
        return self._read(ids_RT, layers, past_key_values=copy.deepcopy(cache), use_cache=True)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens after which generation ends, by the model's generation configuration."""
        configuration = self.model.generation_config or self.model.config
        ids = getattr(configuration, "eos_token_id", None)
        return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)

    def check_layers(self, layers: Iterable[int]) -> None:
        """ValueError for layers that the model does not have."""
        if beyond := [layer for layer in layers if not 0 <= layer <= self.n_layers]:
            raise ValueError(f"the model has the layers 0-{self.n_layers}, asked for {beyond}")

    @cached_property
    def output_forms(self) -> OutputForms:
        """Found by passing a token through."""
        found: dict[nn.Module, Any] = {}

        def note(module: nn.Module, _: Any, output: Any) -> None:
            found[module] = output

        decoder = self.model.get_decoder()
        with contextlib.ExitStack() as hooks:
            for module in (decoder, *self.blocks):
                hooks.callback(module.register_forward_hook(note).remove)
            self.logits(torch.zeros(1, 1))
        outputs = (found[block] for block in self.blocks)
        extras = [None if isinstance(out, Tensor) else len(out) - 1 for out in outputs]
        return OutputForms(type(found[decoder]), extras)

    def _read(
        self, ids_RT: Tensor, layers: Sequence[int], use_cache: bool = False, **options: Any
    ) -> list[Tensor]:
        kept: dict[int, Tensor] = {}
        with torch.inference_mode(), self._reading(set(layers), kept):
            self.model(ids_RT.to(self.device, torch.long), use_cache=use_cache, **options)
        return [kept[layer] for layer in layers]

    @contextlib.contextmanager
    def _reading(self, layers: set[int], kept: dict[int, Tensor]) -> Iterator[None]:
        """Put the layers into `kept` as a forward pass comes by, and end it after the deepest.

        The layer beyond the last stands for the decoder's output.
        """
        deepest = max(layers)

        def keep(layer: int, residual_RTD: Tensor) -> None:
            kept[layer] = residual_RTD
            if layer == deepest:
                raise _DeepestReached

        def on_entry(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(0, args[0] if args else kwargs["hidden_states"])

        def after(layer: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                keep(layer, output if isinstance(output, Tensor) else output[0])

            return hook

        modules = [*self.blocks, self.model.get_decoder()]
        with contextlib.ExitStack() as hooks, contextlib.suppress(_DeepestReached):
            for layer in layers:
                if layer == 0:
                    handle = self.blocks[0].register_forward_pre_hook(on_entry, with_kwargs=True)
                else:
                    handle = modules[layer - 1].register_forward_hook(after(layer))
                hooks.callback(handle.remove)
            yield


def load_lm(
    name: str | ModelSource,
    *,
    dtype: Dtype = "bfloat16",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    attention: str | None = None,
) -> LanguageModel:
    """Load a decoder-only model by preset, hub id, folder or `.gguf` file.

    `attention` is one of transformers' implementations (`sdpa`, `eager`, ...). A GGUF file is
    converted to float32 safetensors once. Code that comes with a model is run for a source of
    `with_own_code` alone. Raises what `resolve_model` does, and ModelError where a tensor is
    missing, damaged or of another shape, and where the model is not causal.
    """
    source = resolve_model(name, revision=revision)
    where = pretrained(source)
    with loading(source):
        raw_config, _ = transformers.PreTrainedConfig.get_config_dict(**where)
        config = transformers.AutoConfig.from_pretrained(**where)
        _refuse_encoder(source.name, config)
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                **where,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                ignore_mismatched_sizes=True,  # reported, and refused below with their names
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise ModelError(
                f"the weights of {source.name!r} are damaged ({error}); remove or replace "
                f"{where['pretrained_model_name_or_path']}"
            ) from error
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise ModelError(
            f"the weights of {source.name!r} do not fit its configuration; "
            f"missing or of another shape: {', '.join(sorted(map(str, wrong))[:5])}"
        )
    model.eval().requires_grad_(False).to(device)
    identity = ModelIdentity(
        name=source.name,
        revision=source.revision or getattr(config, "_commit_hash", None),
        config_hash=config_hash(raw_config, _own_code(model)),
        weights=weights_hash(model),
        dtype=dtype,
    )
    lm = LanguageModel(model, identity)
    _check_causal(lm)
    return lm


def model_shape(source: ModelSource) -> ModelShape:
    """The sizes of a model, without its weights; raises what `load_lm` does."""
    where = pretrained(source)
    with loading(source):
        config = transformers.AutoConfig.from_pretrained(**where)
    _refuse_encoder(source.name, config)
    return _shape(config)


def block_parameters(source: ModelSource) -> int:
    """Weights in the largest decoder block, counted without loading any; for estimates."""
    where = pretrained(source)
    with loading(source), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(**where)
        own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
        if source.own_code and own:
            model = get_class_from_dynamic_module(own, **where)(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    blocks = _decoder_blocks(model, _shape(config).n_layers)
    return max(sum(p.numel() for p in block.parameters()) for block in blocks)


def pretrained(source: ModelSource) -> dict[str, Any]:
    """The arguments by which transformers finds a model or tokenizer; converts a GGUF file."""
    location = source.location
    if source.kind == "gguf":
        location = str(converted(Path(location), _convert_gguf))
    return {
        "pretrained_model_name_or_path": location,
        "revision": source.revision or "main",
        "local_files_only": source.cached_only,
        "trust_remote_code": source.own_code,
    }


def with_own_code(source: ModelSource) -> ModelSource:
    """Allow the code that comes with a model to be run, and warn of it; without any, no change.

    Raises what `load_lm` does for files that are not there, and ModelError where the code is that
    of another repository, which `source` does not name and whose revision nobody has chosen.
    """
    if source.kind == "gguf":
        return source
    where = pretrained(source)
    with loading(source):
        config, _ = transformers.PreTrainedConfig.get_config_dict(**where)
        maps = [config.get("auto_map"), get_tokenizer_config(**where).get("auto_map")]
    if not any(maps):
        return source
    if "--" in (classes := json.dumps(maps)):
        raise ModelError(
            f"the code of {source.name!r} is in another repository ({classes}); expected code "
            "beside the model: download both into one folder, read the code, and take the "
            "repository and -- out of auto_map in config.json and tokenizer_config.json"
        )
    if source.kind == "hub":
        place = f"{source.location}, revision {source.revision or 'main'}"
    else:
        place = str(Path(source.location).resolve())
    logger.warning(
        "Running the code that comes with the model %s (%s): it can do whatever you can",
        source.name,
        place,
    )
    return dataclasses.replace(source, own_code=True)


@contextlib.contextmanager
def loading(source: ModelSource) -> Iterator[None]:
    """Turn what goes wrong with a model's files inside the block into ModelError, quietly."""
    with hub_errors(ModelError, "model", source.location), quiet():
        try:
            yield
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"the weights of {source.name!r} hold more than tensors, which is never loaded: "
                "it may be a program; expected safetensors"
            ) from error
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ModelError(
                f"{source.name!r} comes with code of its own, which is run only if asked for: read "
                "that code first, then add --trust-remote-code and say with --model which model it "
                "is about, and for a hub model with --revision the commit that you read"
            ) from error
        except ImportError as error:
            raise ModelError(f"{source.name!r} cannot be loaded here: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing messages and bars to the terminal."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _convert_gguf(file: Path, folder: Path) -> None:
    """Save a GGUF file's model, in float32 so that nothing is lost, and its tokenizer."""
    logger.info("converting %s to safetensors; this is done once", file.name)
    where = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "trust_remote_code": False,
    }
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its bar heeds no setting
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # the weights are plain numbers now, but saving is refused while these say otherwise
        del model.config.quantization_config
        del model.hf_quantizer
        model.is_quantized = False
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(f"cannot write the converted model to {folder}: {error}") from error
        transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _own_code(model: Any) -> set[Path]:
    """The files of a model's and its configuration's classes, if they came with it."""
    files = {
        Path(inspect.getfile(of))
        for of in (type(model), type(model.config))
        if of.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
    }
    return files | {Path(used) for file in files for used in get_relative_import_files(file)}


def _shape(config: Any) -> ModelShape:
    text = config.get_text_config()
    try:
        return ModelShape(
            n_layers=text.num_hidden_layers,
            width=text.hidden_size,
            vocab_size=text.vocab_size,
            context_limit=getattr(text, "max_position_embeddings", None),
        )
    except AttributeError as error:  # of a class that came with the model
        raise ModelError(
            f"the configuration ({type(text).__name__}) has no {error.name}; expected "
            "num_hidden_layers, hidden_size and vocab_size"
        ) from error


def _decoder_blocks(model: Any, n_layers: int) -> nn.ModuleList:
    """The list of as many modules as the configuration has layers, the shallowest such."""
    lists = [
        (name.count("."), module)
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        raise ModelError(f"found no list of {n_layers} decoder blocks in {type(model).__name__}")
    return min(lists, key=lambda found: found[0])[1]


def _refuse_encoder(name: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name!r} is an encoder-decoder model ({config.model_type}); "
            "expected a decoder-only causal language model"
        )


def _check_causal(lm: LanguageModel) -> None:
    """Change the later tokens of a row: the first block's output at the earlier ones must stay."""
    first_1T = torch.arange(16)[None]
    second_1T = torch.where(first_1T < 8, first_1T, first_1T + 8)
    a_1TD, b_1TD = (
        lm.residuals(ids_1T % lm.vocab_size, [1])[0][:, :8].float()
        for ids_1T in (first_1T, second_1T)
    )
    tolerance = 8 * torch.finfo(lm.dtype).eps * a_1TD.abs().max()
    if (a_1TD - b_1TD).abs().max() > tolerance:
        raise ModelError(
            f"{lm.identity.name!r} lets a token see those after it; "
            "expected a decoder-only causal language model"
        )
