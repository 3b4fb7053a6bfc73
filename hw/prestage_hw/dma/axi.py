"""AXI4 interfaces: reads only, writes only, or both."""

from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = [
    "BURST_INCR",
    "EDGE_BYTES",
    "AXI4ReadSignature",
    "AXI4Signature",
    "AXI4WriteSignature",
]

#: Encoding of an incrementing burst.
BURST_INCR = 1

#: No burst may cross a multiple of this address, in bytes (AXI4 specification, A3.4.1).
EDGE_BYTES = 4096


class _Signature(wiring.Signature):
    """What the interfaces share: their widths."""

    def __init__(self, *, address_bits, data_bits, id_bits=1):
        for what, value in (
            ("Address width", address_bits),
            ("Data width", data_bits),
            ("ID width", id_bits),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{what} must be an integer, not {value!r}")
        if not 12 <= address_bits <= 64:
            raise ValueError(f"Address width must be between 12 and 64 bits, not {address_bits}")
        if not 8 <= data_bits <= 1024 or data_bits & (data_bits - 1):
            raise ValueError(
                f"Data width must be a power of two from 8 to 1024 bits, not {data_bits}"
            )
        if id_bits < 1:
            raise ValueError(f"ID width must be at least 1 bit, not {id_bits}")
        self.address_bits = address_bits
        self.data_bits = data_bits
        self.id_bits = id_bits
        super().__init__(self._members())

    def _members(self):
        """Members by name."""
        raise NotImplementedError

    def _reads(self):
        """Those of reads."""
        return {
            "arvalid": Out(1),
            "arready": In(1),
            "araddr": Out(self.address_bits),
            "arlen": Out(8),
            "arsize": Out(3),
            "arburst": Out(2),
            "arid": Out(self.id_bits),
            "rvalid": In(1),
            "rready": Out(1),
            "rdata": In(self.data_bits),
            "rresp": In(2),
            "rlast": In(1),
            "rid": In(self.id_bits),
        }

    def _writes(self):
        """Those of writes."""
        return {
            "awvalid": Out(1),
            "awready": In(1),
            "awaddr": Out(self.address_bits),
            "awlen": Out(8),
            "awsize": Out(3),
            "awburst": Out(2),
            "awid": Out(self.id_bits),
            "wvalid": Out(1),
            "wready": In(1),
            "wdata": Out(self.data_bits),
            "wstrb": Out(self.data_bytes),
            "wlast": Out(1),
            "bvalid": In(1),
            "bready": Out(1),
            "bresp": In(2),
            "bid": In(self.id_bits),
        }

    @property
    def data_bytes(self):
        """Bytes in a beat."""
        return self.data_bits // 8

    def __eq__(self, other):
        return (
            type(self) is type(other)
            and self.address_bits == other.address_bits
            and self.data_bits == other.data_bits
            and self.id_bits == other.id_bits
        )

    def __repr__(self):
        return (
            f"{type(self).__name__}(address_bits={self.address_bits}, data_bits={self.data_bits},"
            f" id_bits={self.id_bits})"
        )


class AXI4ReadSignature(_Signature):
    """Address and data channels of AXI4 reads, from the master's view.

    Parameters
    ----------
    address_bits : :class:`int`
        Width of an address, in bits, 12 to 64.
    data_bits : :class:`int`
        Width of a beat, in bits: a power of two from 8 to 1,024.
    id_bits : :class:`int`
        Width of a transaction's number, in bits, at least 1.

    Members
    -------
    arvalid, araddr, arlen, arsize, arburst, arid : ``Out``
        Address channel: ``arlen + 1`` beats of ``2 ** arsize`` bytes.
    arready : ``In(1)``
        Address taken.
    rvalid, rdata, rresp, rlast, rid : ``In``
        Data channel.
    rready : ``Out(1)``
        Beat taken.

    Raises
    ------
    TypeError
        If a width is not an integer.
    ValueError
        If a width is out of its range.
    """

    def _members(self):
        return self._reads()


class AXI4Signature(_Signature):
    """Address, data and answer channels of AXI4 reads and writes, from the master's view.

    Parameters
    ----------
    address_bits, data_bits, id_bits : :class:`int`
        As in :class:`AXI4ReadSignature`.

    Members
    -------
    ar..., r... :
        As in :class:`AXI4ReadSignature`.
    awvalid, awaddr, awlen, awsize, awburst, awid : ``Out``
        Address channel of writes: ``awlen + 1`` beats of ``2 ** awsize`` bytes.
    awready : ``In(1)``
        Address taken.
    wvalid, wdata, wstrb, wlast : ``Out``
        Data channel of writes; a bit of ``wstrb`` for each byte that is written.
    wready : ``In(1)``
        Beat taken.
    bvalid, bresp, bid : ``In``
        Answer to a write.
    bready : ``Out(1)``
        Answer taken.

    Raises
    ------
    TypeError
        If a width is not an integer.
    ValueError
        If a width is out of its range.
    """

    def _members(self):
        return self._reads() | self._writes()


class AXI4WriteSignature(_Signature):
    """Address, data and answer channels of AXI4 writes, from the master's view.

    Parameters
    ----------
    address_bits, data_bits, id_bits : :class:`int`
        As in :class:`AXI4ReadSignature`.

    Members
    -------
    aw..., w..., b... :
        As in :class:`AXI4Signature`.

    Raises
    ------
    TypeError
        If a width is not an integer.
    ValueError
        If a width is out of its range.
    """

    def _members(self):
        return self._writes()
