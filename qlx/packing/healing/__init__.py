"""Healing after packing: error compensation, tuned scales and rounding, more bits where they are needed."""

from qlx.packing.healing.heal import Healed, Healing, heal

__all__ = ["Healed", "Healing", "heal"]
