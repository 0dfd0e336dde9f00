"""Composition and entry points: what runs when."""

from flows.environment import prepare

prepare()
