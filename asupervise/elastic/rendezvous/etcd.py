"""A run whose nodes agree through etcd."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from asupervise.elastic.coordinator import Coordinator
from asupervise.elastic.engine import EngineError
from asupervise.elastic.rendezvous import Request
from asupervise.elastic.rendezvous.etcd_engine import EtcdConfig, EtcdEngine
from asupervise.elastic.values import seconds_of

__all__ = ["config_of", "open"]

_DEFAULT_PORT: Final = "2379"
_KEYS: Final = frozenset(
    {
        *("prefix", "lease_ttl", "timeout", "protocol", "cacert", "cert", "key", "user"),
        *("password", "password_file", "join_timeout", "last_call_timeout"),
    }
)
_PASSWORD_VARIABLE: Final = "ASUPERVISE_ETCD_PASSWORD"


def config_of(request: Request, environ: Mapping[str, str]) -> EtcdConfig:
    """Where etcd is, from ``--rdzv-endpoint`` and ``--rdzv-conf``.

    Args:
        request: of the run.
        environ: where ``ASUPERVISE_ETCD_PASSWORD`` is looked for.

    Raises:
        EngineError: for an endpoint or a pair that makes no sense, or a file that cannot be read.
    """
    conf = request.conf
    if unknown := sorted(set(conf) - _KEYS):
        raise EngineError(
            f"--rdzv-conf: {', '.join(unknown)}: not known to etcd's backend",
            hint=f"known: {', '.join(sorted(_KEYS))}",
        )
    protocol = conf.get("protocol", "https" if "cacert" in conf or "cert" in conf else "http")
    if protocol not in ("http", "https"):
        raise EngineError(f"--rdzv-conf protocol={protocol}: expected http or https")
    return EtcdConfig(
        endpoints=_endpoints(request.endpoint),
        prefix=f"{conf.get('prefix', '/asupervise').rstrip('/')}/{request.run_id}/",
        lease_s=seconds_of(conf, "lease_ttl", 10.0),
        timeout_s=seconds_of(conf, "timeout", 10.0),
        tls=protocol == "https",
        ca=_file(conf, "cacert"),
        cert=_file(conf, "cert"),
        key=_file(conf, "key"),
        user=conf.get("user"),
        password=_password(conf, environ),
    )


def _endpoints(text: str) -> tuple[str, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise EngineError(
            "etcd's backend needs to know where etcd is",
            hint="--rdzv-endpoint HOST:2379 (several with commas between them)",
        )
    return tuple(_with_port(part) for part in parts)


def _with_port(endpoint: str) -> str:
    bare = endpoint.removeprefix("http://").removeprefix("https://").rstrip("/")
    named = bare.rpartition("]")[2] if bare.startswith("[") else bare
    return bare if ":" in named else f"{bare}:{_DEFAULT_PORT}"


def _file(conf: Mapping[str, str], key: str) -> bytes | None:
    if key not in conf:
        return None
    try:
        with open_file(conf[key], "rb") as file:
            data: bytes = file.read()
            return data
    except OSError as exc:
        raise EngineError(f"--rdzv-conf {key}={conf[key]}: {exc.strerror}") from None


def _password(conf: Mapping[str, str], environ: Mapping[str, str]) -> str | None:
    # In a file or a variable, because anybody on the machine can read our arguments.
    if (data := _file(conf, "password_file")) is not None:
        return data.decode(errors="surrogateescape").rstrip("\n")
    return conf.get("password", environ.get(_PASSWORD_VARIABLE))


# `open` is the backend's own, below.
open_file = open


@asynccontextmanager
async def open(request: Request) -> AsyncIterator[Coordinator]:
    """This node's part in a run on etcd.

    Raises:
        EngineError: if etcd cannot be had; see `config_of`.
    """
    try:
        engine = await EtcdEngine.open(config_of(request, os.environ))
    except ImportError:
        raise EngineError(
            "etcd's backend needs the package aetcd", hint="pip install 'asupervise[etcd]'"
        ) from None
    try:
        async with Coordinator.open(
            engine, request.node, request.terms, request.policy
        ) as coordinator:
            yield coordinator
    finally:
        await engine.close()
