"""A pickle reader that executes nothing: it understands what torch writes for tensors and DTensors,
and refuses the rest.

Checkpoints are untrusted input, and pickles of DTensors name torch-internal classes that come and
go between releases. So no class is ever looked up: a GLOBAL is only a name. Names of tensor
storage, placements and meshes become inert records, out of which tensors' places in the file and
their sharding are read; every other name ends the reading with a ValueError.
"""

from __future__ import annotations

import pickletools
from collections.abc import Sized
from typing import Any

from retool.checkpoint.format.allowed_names import Name, Refused, name_of
from retool.checkpoint.format.stored_tensors import (
    MOST_DIMENSIONS,
    Attributed,
    Record,
    call,
    expect,
    instance,
    key_of,
    storage_of,
)
from retool.files.untrusted import shown

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# An opcode takes about a microsecond. Real files have 80 to 160 of them for each tensor, and a
# hundred thousand besides at most.
WORK_OF_A_FILE = 1_000_000
WORK_OF_A_RECORD = 500


def parse(data: bytes, records: int = 0) -> Any:
    """The object that a pickle describes, tensors as `StoredTensor` and `StoredShard`.

    ValueError for anything else than data.

    `records` is how many tensors the file holds: it bounds the work that the pickle may ask for.
    """
    machine = _Machine(WORK_OF_A_FILE + records * WORK_OF_A_RECORD)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.spend(1)
            machine.step(opcode.name, argument)
    except Refused:
        raise
    except (
        Exception
    ) as error:  # a broken stream can break the machine anywhere; what matters is that it is broken
        raise ValueError(f"broken pickle: {type(error).__name__}: {shown(str(error))}") from error
    raise ValueError("broken pickle: it has no end")


class _Machine:
    """The stack machine for the opcodes that torch writes."""

    def __init__(self, work: int) -> None:
        self.work = work
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def spend(self, work: int) -> None:
        """Count opcodes and copied items: shared items may be copied any number of times."""
        self.work -= work
        if self.work < 0:
            raise Refused("refused: reading it would take more work than any real file of its kind")

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def step(self, op: str, argument: Any) -> None:
        if op in LITERALS:
            self.stack.append(argument)
        elif op in CONSTANTS:
            self.stack.append(CONSTANTS[op])
        elif op in TUPLES:
            count = TUPLES[op]
            items = tuple(self.pop() for _ in range(count))[::-1]
            self.stack.append(items)
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        # PROTO and FRAME say how the stream is laid out, and build nothing.
        elif op not in ("PROTO", "FRAME"):
            self._compose(op, argument)

    def _compose(self, op: str, argument: Any) -> None:
        match op:
            case "MARK":
                self.marks.append(self.stack)
                self.stack = []
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = [self.pop()] if op == "APPEND" else self.pop_mark()
                expect(list, self.stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = (
                    self.pop_mark() if op == "SETITEMS" else [self.pop() for _ in range(2)][::-1]
                )
                expect(dict, self.stack[-1]).update(
                    (key_of(k), v) for k, v in zip(items[::2], items[1::2], strict=True)
                )
            case "GLOBAL":
                self.stack.append(name_of(argument))
            case "STACK_GLOBAL":
                name = self.pop()
                module = self.pop()
                self.stack.append(name_of(f"{module} {name}"))
            case "BINPERSID":
                self.stack.append(storage_of(self.pop()))
            case "REDUCE":
                args = self._arguments()
                self.stack.append(call(expect(Name, self.pop()).name, args))
            case "NEWOBJ":
                args = self._arguments()
                self.stack.append(instance(expect(Name, self.pop()).name, args))
            case "BUILD":
                self._build(expect(dict, self.pop()), self.stack[-1])
            case _:
                raise Refused(f"refused pickle opcode {op}: torch writes no such thing for tensors")

    def _arguments(self) -> tuple[Any, ...]:
        args = expect(tuple, self.pop())
        # A tensor's shape is the longest thing that torch passes to a call
        if len(args) > MOST_DIMENSIONS:
            raise ValueError(f"a call with {len(args)} arguments")
        self.spend(sum(len(arg) for arg in args if isinstance(arg, Sized)))
        return args

    def _build(self, state: dict[Any, Any], target: Any) -> None:
        """Set an object's attributes."""
        self.spend(len(state))
        if isinstance(target, Record):
            target.state.update(state)
        elif isinstance(target, Attributed):
            target.attributes.update(state)
        else:
            raise ValueError(f"attributes for a {type(target).__name__}")
