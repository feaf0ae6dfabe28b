"""What every room asks of its arguments: counts, seeds, lists, batches, which process this is; what errors quote."""

import os

import numpy as np
import torch


def quoted(value, limit=100):
    """A value as an error message shows it: its repr, of which at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def check_count(name, value):
    """Raises: ValueError unless `value`, the argument called `name`, is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={quoted(value)}: expected a whole number of at least 1")


def check_seed(value):
    """Raises: ValueError unless `value` is a whole number from 0 to 2**32 - 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**32:
        raise ValueError(f"seed={quoted(value)}: expected a whole number from 0 to {2**32 - 1}")


def check_number(name, value, expected, accepts):
    """The value as a float. Raises: ValueError unless it is one number that `accepts` says yes to.

    Args: name: of the argument; expected: what is accepted, in words; accepts: function of a float.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
        raise ValueError(f"{name}={quoted(value)}: expected {expected}") from None
    if not accepts(number):
        raise ValueError(f"{name}={quoted(value)}: expected {expected}")
    return number


def check_smiles_list(name, values):
    """The values as a list. Raises: ValueError for one text, which would be read letter by letter, and for a table.

    Args: name: of the function that was given them.
    """
    if isinstance(values, str):
        raise ValueError(f"{name}({quoted(values)}): expected a list of SMILES; wrap a single one in [ ]")
    if hasattr(values, "columns") or isinstance(values, dict):
        raise ValueError(f"{name} got a table: expected a list of SMILES; pass its column, such as table['smiles']")
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"{name}({quoted(values)}): expected a list of SMILES") from None


def this_process():
    """Which of how many processes this is, (rank from 0, number), by the variables that `accelerate launch` sets.

    Raises: ValueError for a rank that there is not.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world}: expected process RANK, from 0, of WORLD_SIZE")
    return int(rank), int(world)


def check_finite(name, *tensors):
    """Raises: ValueError where one of the tensors, together called `name`, holds NaN or infinite values."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(f"{name}: NaN or infinite values; weights, latents or vectors are damaged")


def slices(num_molecules, batch_size):
    """The slices of 0 .. num_molecules - 1, one after the other, for there may be very many.

    Raises: ValueError at once for what are no counts.
    """
    check_count("num_molecules", num_molecules)
    check_count("batch_size", batch_size)
    starts = range(0, num_molecules, batch_size)
    return (slice(start, min(start + batch_size, num_molecules)) for start in starts)


def part_of(value, batch):
    """What a batch, a slice of all molecules, gets of an argument: its part of a tensor or of a dict's sequences."""
    if isinstance(value, dict):
        return {key: part_of(entry, batch) for key, entry in value.items()}
    return value[batch] if is_for_each(value) else value


def is_for_each(value):
    """Whether an argument is a sequence that holds a value for each molecule."""
    return not isinstance(value, str) and np.ndim(value) > 0


def check_lengths(name, value, num_molecules):
    """Raises: ValueError for a sequence, in a dict too, that is not of num_molecules values."""
    if isinstance(value, dict):
        for key, entry in value.items():
            check_lengths(key, entry, num_molecules)
    elif is_for_each(value) and len(value) != num_molecules:
        raise ValueError(f"{name} has {len(value)} values for {num_molecules} molecules; expected one for each")
