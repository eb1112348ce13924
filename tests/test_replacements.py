"""What the integrations put in place of other libraries' functions comes back, and a later release's are noticed."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from flashkda_ops.integrations import _known, flash_kda
from flashkda_ops.integrations import transformers as hf
from flashkda_ops.integrations._replacements import Replacements, name_of, place_of
from flashkda_ops.integrations._signatures import Theirs, drift

logger = logging.getLogger("test_replacements")


def make_module() -> ModuleType:
    module = ModuleType("theirs")
    exec(
        "def f(x): return ['theirs', x]\nclass C:\n    @classmethod\n    def f(cls, x): return ['theirs', x]",
        vars(module),
    )
    return module


@pytest.fixture(params=["a module", "a class", "a class that inherits it"])
def owner(request: pytest.FixtureRequest) -> Any:
    module = make_module()
    if request.param == "a module":
        return module
    return module.C if request.param == "a class" else type("D", (module.C,), {"__module__": "theirs"})


@pytest.fixture
def ours(owner: Any) -> Replacements:
    """Switched off, ours hands on what it is given."""
    return Replacements(logger)


def put(ours: Replacements, owner: Any) -> None:
    def make(found: Any) -> Any:
        theirs = found.__func__ if hasattr(found, "__func__") else found

        @functools.wraps(theirs)
        def f(*args: Any) -> list[Any]:
            return ["ours", *theirs(*args)] if ours.active else theirs(*args)

        if isinstance(found, staticmethod):
            return staticmethod(f)
        return classmethod(f) if theirs is not found else f

    ours.put(owner, "f", make)
    ours.active = True


def wrap(owner: Any) -> Callable[[], None]:
    """What a profiler does; returns how it ends."""
    found, inner = vars(owner)["f"], owner.f

    @functools.wraps(inner)
    def profiled(*args: Any) -> list[Any]:
        return ["profiled", *inner(*args)]

    owner.f = staticmethod(profiled) if isinstance(owner, type) else profiled
    return lambda: setattr(owner, "f", found)


def test_what_was_there_is_put_back(owner: Any, ours: Replacements, caplog: pytest.LogCaptureFixture) -> None:
    before = dict(vars(owner))
    ours.undo()
    for _ in range(2):
        put(ours, owner)
        put(ours, owner)
        assert owner.f(1) == ["ours", "theirs", 1]
        ours.undo()
        ours.undo()
        assert dict(vars(owner)) == before and owner.f(1) == ["theirs", 1]
    assert caplog.records == []


def test_a_wrapper_that_came_later_stays_and_is_reported_once(
    owner: Any, ours: Replacements, caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(vars(owner))
    put(ours, owner)
    end = wrap(owner)
    assert owner.f(1) == ["profiled", "ours", "theirs", 1]
    ours.undo()
    ours.undo()
    assert owner.f(1) == ["profiled", "theirs", 1]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("theirs.") and f"f is left as it is: profiled ({__file__}, line " in message
    assert message.endswith("wraps ours, which now hands its calls on")
    put(ours, owner)  # which is in there already
    assert owner.f(1) == ["profiled", "ours", "theirs", 1]
    ours.undo()
    end()
    ours.undo()
    assert dict(vars(owner)) == before


def test_a_wrapper_that_is_gone_again_is_no_obstacle(owner: Any, ours: Replacements) -> None:
    before = dict(vars(owner))
    put(ours, owner)
    end = wrap(owner)
    ours.undo()
    end()
    put(ours, owner)
    assert owner.f(1) == ["ours", "theirs", 1]
    ours.undo()
    assert dict(vars(owner)) == before


def test_what_has_replaced_ours_stays_and_is_replaced_by_the_next(
    owner: Any, ours: Replacements, caplog: pytest.LogCaptureFixture
) -> None:
    put(ours, owner)
    kept = owner.f

    def other(x: int) -> list[Any]:
        return ["other", x]

    owner.f = staticmethod(other) if isinstance(owner, type) else other
    ours.undo()
    assert owner.f(1) == ["other", 1] and kept(1) == ["theirs", 1]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "other (" in message and message.endswith(" has replaced ours")
    put(ours, owner)
    assert owner.f(1) == ["ours", "other", 1]
    ours.undo()
    assert owner.f(1) == ["other", 1]


def test_a_name_that_somebody_deleted_is_not_made_again() -> None:
    ours, module = Replacements(logger), make_module()
    put(ours, module)
    del module.f
    ours.undo()
    assert not hasattr(module, "f")


def test_what_cannot_be_replaced_is_not_touched() -> None:
    ours, module = Replacements(logger), make_module()
    ours.put(module, "f", lambda found: found)
    wrap(module)
    ours.undo()
    assert module.f(1) == ["profiled", "theirs", 1]


def test_names_are_those_of_what_is_called() -> None:
    assert name_of(functools.partial(make_module)) == f"{__name__}.make_module"
    assert name_of(Replacements(logger).put) == "flashkda_ops.integrations._replacements.Replacements.put"
    assert name_of(logging) == place_of(logging) == "logging" and place_of(dict) == "builtins.dict"


# ---------------------------------------------------------------------------------------------------------------------
# Signatures
# ---------------------------------------------------------------------------------------------------------------------


def known(q: Any, k: Any, scale: Any = None, *, fast: bool = False, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (known, ""),
        (lambda q, k, scale=None, fast=False: None, ""),
        (functools.partial(known), ""),
        (lambda *args, **kwargs: None, ""),  # a wrapper that does not tell
        (dict, ""),  # written in C
        (lambda q, k, *, mask, scale=None, fast=False: None, "mask is new and required"),
        (lambda q, k, cap=1, scale=None: None, "cap is new, 1 by default; fast is gone; cap comes where scale came"),
        (lambda q, k, scale=None, fast=False, cap=1.5: None, "cap is new, 1.5 by default"),
        (lambda q, k, fast=False, **kwargs: None, "scale is gone"),
        (lambda q, k, scale=None, fast=True: None, "fast is True by default, and was False by default"),
        (lambda q, k, scale, fast=False: None, "scale is required, and was None by default"),
        (lambda k, q, scale=None, fast=False: None, "k comes where q came"),
        (
            lambda query, k, scale=1, fast=False, cap=None: None,
            "query is new and required; cap is new, None by default; q is gone; "
            "scale is 1 by default, and was None by default; query comes where k came",
        ),
    ],
)  # fmt: skip
def test_a_drift_is_told_in_words(function: Any, text: str) -> None:
    found = drift(function, known)
    assert str(found) == text and bool(found) == bool(text)


def test_a_name_that_is_known_otherwise_is_not_new() -> None:
    assert not drift(lambda q, k, scale=None, *, cap=0, fast=False: None, known, also=("cap",))


def test_arguments_go_by_the_names_and_defaults_of_the_function_that_is_there() -> None:
    theirs = Theirs(lambda k, q, cap=None, scale=2, fast=False: None, known)
    assert theirs.arguments((1, 2), {"cap": 3, "more": 4}) == {
        "k": 1, "q": 2, "cap": 3, "scale": 2, "fast": False, "more": 4
    }  # fmt: skip
    assert theirs.unknown(theirs.arguments((1, 2), {"cap": 3})) == "cap"
    assert theirs.unknown(theirs.arguments((1, 2), {})) is None
    assert theirs.unknown(theirs.arguments((1, 2, None), {})) is None


# ---------------------------------------------------------------------------------------------------------------------
# What is installed
# ---------------------------------------------------------------------------------------------------------------------


def test_flas_functions_and_classes_are_the_ones_that_are_known() -> None:
    pytest.importorskip("fla.models")
    from flashkda_ops.integrations import fla
    from flashkda_ops.nn.convert import FLA_CLASSES, fla_drift

    assert not fla._CHUNK.drift and not fla._RECURRENT.drift
    from_legacy_cache = "fla.models.cache_utils.FLACache.from_legacy_cache"
    found = pkgutil.resolve_name(from_legacy_cache)
    assert not drift(found.__func__, _known.FUNCTIONS[from_legacy_cache])
    assert {name for _, name in FLA_CLASSES} == _known.CLASSES.keys()
    for module, name in FLA_CLASSES:
        assert fla_drift(pkgutil.resolve_name(f"{module}.{name}")).text == "", name


def test_the_functions_of_transformers_are_the_ones_that_are_known() -> None:
    pytest.importorskip("transformers", minversion="5.23")
    for model in hf.MODELS:
        for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):
            function = pkgutil.resolve_name(f"transformers.models.{model}.modeling_{model}.{name}")
            assert str(drift(function, _known.FUNCTIONS[name])) == "" and inspect.signature(function).parameters


# ---------------------------------------------------------------------------------------------------------------------
# Together
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_flash_kda(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("flash_kda")
    module.fwd = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_kda", module)
    yield module
    flash_kda.uninstall()


@pytest.mark.parametrize("last_first", [True, False])
def test_several_integrations_come_and_go_in_any_order(
    real_flash_kda: ModuleType, last_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    pytest.importorskip("fla.models")
    import fla.backends
    from fla.models.cache_utils import FLACache
    from fla.models.kda import KDAForCausalLM
    from fla.modules import RMSNorm
    from transformers.models.kimi_linear import modeling_kimi_linear

    from flashkda_ops.integrations import fla as integration

    def everything() -> list[Any]:
        owners = (real_flash_kda, modeling_kimi_linear, KDAForCausalLM, RMSNorm, FLACache)
        registries = [*fla.backends._function_registries.values(), *fla.backends._operation_registries.values()]
        return [dict(vars(x)) for x in owners] + [dict(r._backends) for r in registries]

    switches = [
        (lambda: integration.enable(compile=True), integration.disable),
        (hf.enable, hf.disable),
        (flash_kda.install, flash_kda.uninstall),
    ]
    before = everything()
    for order in itertools.permutations(switches):
        for on, _ in order:
            on()
        assert all(a != b for a, b in zip(everything()[:5], before[:5], strict=True))
        for _, off in reversed(order) if last_first else order:
            off()
        assert everything() == before
    assert caplog.records == []
