"""Telling people: verdicts, alarms and what waits for them, through Prefect's notification blocks used as a library.

Told at least once: a night that is killed after it told may tell again. What cannot be delivered is a warning, never a
failure. An address is a secret: it is shown without its path.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

from iterative_ppo.config import Config, NotifyConfig

ADDRESS = "IPPO_NOTIFY_URL"
SLACK_HOSTS = ("hooks.slack.com", "hooks.slack-gov.com")
Event = Literal["verdict", "alarm", "approval", "champion"]

log = logging.getLogger("iterative_ppo.notify")  # below a name that Prefect's flow runs listen to


def tell(config: Config, event: Event, subject: str, body: str) -> bool:
    """Send a message where `notify` names an address; True where it was delivered.

    Args:
        event: verdict (of a round), alarm, approval (somebody is waited for), champion (moved outside or put back).
    """
    url = address(config.notify)
    if url is None:
        return False
    try:
        with _quiet():
            block = _block(config.notify.kind, url, event)
            with block.raise_on_failure():
                block.notify(body=body, subject=f"iterative-ppo: {subject}")
    except Exception as error:  # whatever a receiver, a proxy or a library raises: a round never fails for it
        log.warning("%s was not told (%s): %s at %s", event, subject, _fault(error), shown(url))
        return False
    return True


def address(config: NotifyConfig) -> str | None:
    """Where to, or None: the environment's IPPO_NOTIFY_URL wins over the configuration."""
    return os.environ.get(ADDRESS) or (config.url.get_secret_value() if config.url else None)


def shown(url: str) -> str:
    """The address without what is secret in it: user, path and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}/***" if parts.hostname else "***"


def _block(kind: str, url: str, event: str) -> Any:
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
    from pydantic import SecretStr

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected http(s)://...")
    if kind == "webhook":
        message = {"event": event, "subject": "{{subject}}", "body": "{{body}}"}
        named = {"name": "iterative-ppo", "url": url, "json_data": message}
        return CustomWebhookNotificationBlock.model_validate(named)
    if parts.hostname not in SLACK_HOSTS:
        raise ValueError(f"expected an incoming webhook at {' or '.join(SLACK_HOSTS)}; for others: notify.kind webhook")
    return SlackWebhook(url=SecretStr(url))


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries log whole addresses, also of what they delivered."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpcore", "apprise")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fault(error: Exception) -> str:
    """What went wrong without the address, which the libraries' own messages hold."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"answer {response.status_code}"
    return str(error) if type(error) is ValueError else type(error).__name__
