"""What the harnesses share: free inputs, and sight of a block's inner signals and memories."""

import sys

from amaranth import Const, Signal
from amaranth.asserts import AnySeq
from amaranth.hdl import Assert, Fragment, MemoryInstance
from amaranth.hdl import _ast as ast
from amaranth.lib import wiring
from amaranth.lib.wiring import In

__all__ = ["Held", "Inside", "drive_freely", "lemma", "without_lemmas"]

_with_lemmas = True


def without_lemmas():
    """Leave lemmas out from now on: a broken twin has to fail in what is claimed."""
    global _with_lemmas
    _with_lemmas = False


def lemma(condition):
    """Assertion that only helps induction along: about inner signals, no claim of its own."""
    return [Assert(condition, src_loc_at=1)] if _with_lemmas else []


def drive_freely(m, block, *, but=()):
    """Let every input of a block be anything in every cycle.

    Parameters
    ----------
    m : Module
        Harness.
    block : Component
        The block.
    but : iterable of :class:`str`
        Inputs, or interfaces, that are left alone: names as in the block, ``"bus"`` or
        ``"bus.rvalid"``.

    Raises
    ------
    ValueError
        If the block has no such input.
    """
    unused = set(but)
    for path, member, value in block.signature.flatten(block):
        name = ".".join(str(step) for step in path)
        known = {name, str(path[0])} & set(but)
        unused -= known
        if member.flow is In and not known:
            value = ast.Value.cast(value)
            m.d.comb += value.eq(AnySeq(len(value)))
    if unused:
        raise ValueError(f"Block has no member {', '.join(sorted(unused))}")


class Inside:
    """An elaborated block whose inner signals and memories can be read by name.

    Nothing is added to the block but ports that read.

    Parameters
    ----------
    block : Elaboratable
        The block; add :attr:`fragment`, not the block, to the harness.
    """

    def __init__(self, block):
        self._block = block
        self._locals = []

        def watch(frame, event, argument):
            if event == "return" and frame.f_code.co_name == "elaborate":
                values = dict(frame.f_locals)
                for name, value in values.items():
                    if isinstance(value, Signal) and value.name.startswith("$"):
                        value.name = name
                self._locals.append((values.get("self"), values))

        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            self.fragment = Fragment.get(block, None)
        finally:
            sys.setprofile(before)

    def local(self, name, *, part=None):
        """What a variable of a component's ``elaborate`` stands for, such as ``"reads"``.

        Finds signals that :meth:`signal` does not: those that were made in one line with others
        have no name of their own.

        Parameters
        ----------
        name : :class:`str`
            The variable.
        part : :class:`str`
            Class of the component; the block itself if it is left out.

        Raises
        ------
        ValueError
            If there is no such variable, or more than one such component.
        """
        found = [
            values
            for owner, values in self._locals
            if (owner is self._block if part is None else type(owner).__name__ == part)
        ]
        if len(found) != 1:
            raise ValueError(
                f"Component {part or 'itself'} must be there once, not {len(found)} times"
            )
        if name not in found[0]:
            raise ValueError(f"Variable must be one of {', '.join(sorted(found[0]))}, not {name!r}")
        return found[0][name]

    def _find(self, path):
        fragment = self.fragment
        for step in path:
            try:
                fragment = fragment.find_subfragment(step)
            except NameError:
                names = ", ".join(str(name) for _, name, _ in fragment.subfragments)
                raise ValueError(f"Submodule must be one of {names}, not {step!r}") from None
        return fragment

    def signal(self, name):
        """The signal with that name, such as ``"midend.arbiter.left_0"``.

        Raises
        ------
        ValueError
            If there is none, or more than one.
        """
        *path, last = name.split(".")
        fragment = self._find(path)
        found = ast.SignalSet()
        names = set()
        for statements in fragment.statements.values():
            for statement in statements:
                for signal in (*statement._lhs_signals(), *statement._rhs_signals()):
                    names.add(signal.name)
                    if signal.name == last:
                        found.add(signal)
        if len(found) > 1:
            # Ports, its own and those of its submodules, are reached through their components.
            ports = ast.SignalSet()
            parts = (fragment, *(part for part, _, _ in fragment.subfragments))
            for origin in (o for part in parts for o in part.origins or ()):
                for _, _, port in getattr(origin, "signature", wiring.Signature({})).flatten(
                    origin
                ):
                    if isinstance(port := ast.Value.cast(port), Signal):
                        ports.add(port)
            found = ast.SignalSet(signal for signal in found if signal not in ports)
        if len(found) != 1:
            raise ValueError(
                f"Signal {name!r} must be there once among {', '.join(sorted(names))},"
                f" but is {len(found)} times"
            )
        (signal,) = found
        return signal

    def states(self, name):
        """Function that says whether the state machine with that signal is in a state."""
        signal = self.signal(name)
        numbers = {}
        for number in range(1 << len(signal)):
            try:
                numbers[signal.decoder(number).rpartition("/")[0]] = number
            except KeyError:
                break
        return lambda *names: ast.Cat(signal == numbers[n] for n in names or numbers).any()

    def delays(self, path, *, of, cycles):
        """Registers that hold a value one cycle later, two cycles later and so on.

        Parameters
        ----------
        path : :class:`str`
            Submodule, "" for the block.
        of : iterable of :class:`str` or Signal
            Signals that the value is made of; a single one is the value itself.
        cycles : :class:`int`
            Length of the chain.

        Raises
        ------
        ValueError
            If there is no such chain, or more than one.
        """
        prefix = f"{path}." if path else ""
        sources = [
            name if isinstance(name, Signal) else self.signal(f"{prefix}{name}") for name in of
        ]
        fragment = self._find(path.split(".") if path else ())
        registers = {}
        for statement in fragment.statements.get("sync", ()):
            if isinstance(statement, ast.Assign) and isinstance(statement.lhs, ast.Signal):
                registers.setdefault(id(statement.rhs), []).append(statement)
        starts = [
            statement.lhs
            for statements in registers.values()
            for statement in statements
            if (
                statement.rhs is sources[0]
                if len(sources) == 1
                else all(source in statement.rhs._rhs_signals() for source in sources)
            )
        ]
        if len(starts) != 1:
            raise ValueError(f"Delay of {of} must be there once, not {len(starts)} times")
        chain = starts
        while len(chain) < cycles:
            following = [s.lhs for s in registers.get(id(chain[-1]), ())]
            if len(following) != 1:
                raise ValueError(f"Delay of {of} ends after {len(chain)} cycles")
            chain.append(following[0])
        return chain

    def row(self, name, address):
        """What a memory holds at an address, read by a port of its own.

        Raises
        ------
        ValueError
            If there is no memory with that name.
        """
        memory = self._find(name.split("."))
        if not isinstance(memory, MemoryInstance):
            raise ValueError(f"{name!r} is no memory")
        depth = memory._data.depth
        address = ast.Value.cast(address)
        if isinstance(address, ast.Const):
            address = Const(address.value, max(1, (depth - 1).bit_length()))
        value = Signal(memory._data.shape, name=f"row_of_{name.replace('.', '_')}")
        memory.read_port(
            domain="comb",
            addr=address,
            data=ast.Value.cast(value),
            en=Const(1),
            transparent_for=(),
        )
        return value

    def rows(self, name, *, written=False):
        """Every row of a memory; if wanted with what is written to it in this cycle."""
        memory = self._find(name.split("."))
        if not isinstance(memory, MemoryInstance):
            raise ValueError(f"{name!r} is no memory")
        rows = [self.row(name, Const(i, 16)) for i in range(memory._data.depth)]
        if not written:
            return rows
        (port,) = memory._write_ports
        shape = memory._data.shape
        after = [Signal(shape, name=f"{name.replace('.', '_')}_{i}") for i in range(len(rows))]
        for i, row in enumerate(rows):
            now = ast.Mux(port._en & (port._addr == i), port._data, ast.Value.cast(row))
            self.fragment.add_statements("comb", ast.Value.cast(after[i]).eq(now))
        return after


class Held:
    """Properties of a stream: a beat that is offered stays until it is taken.

    Parameters
    ----------
    m : Module
        Harness.
    valid, ready, payload : Value
        The stream.
    name : :class:`str`
        Prefix of signals in waveforms.

    Attributes
    ----------
    kept : Value
        The property.
    waited : Value
        A beat was offered and not taken in the cycle before.
    """

    def __init__(self, m, valid, ready, payload, *, name):
        payload = ast.Value.cast(payload)
        waited = Signal(name=f"{name}_waited")
        before = Signal(len(payload), name=f"{name}_before")
        m.d.sync += [waited.eq(valid & ~ready), before.eq(payload)]
        self.waited = waited
        self.kept = ~waited | (valid & (payload == before))
