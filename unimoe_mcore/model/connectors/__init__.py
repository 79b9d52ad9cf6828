"""Connectors, by name. One file each; a new file registers itself and is found."""

from unimoe_mcore.model.connectors.base import Connector, build_connector, register_connector

__all__ = ["Connector", "build_connector", "register_connector"]
