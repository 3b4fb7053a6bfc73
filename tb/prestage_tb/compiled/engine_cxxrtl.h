// The design as CXXRTL compiles it, behind the same members as engine_verilator.h.

#ifndef PRESTAGE_ENGINE_CXXRTL_H
#define PRESTAGE_ENGINE_CXXRTL_H

#include <cstdint>
#include <cstring>

#include "top.cc"

class Design {
  public:
    Design() {
        top_.p_tx____ready.set(true);
        top_.p_bus____arready.set(true);
        top_.p_beats____ready.set(true);
        top_.step();
    }
    Design(const Design &) = delete;
    Design &operator=(const Design &) = delete;

    // Inputs.
    void rst(bool on) { top_.p_rst.set(on); }
    void rx(bool valid, uint8_t payload) {
        top_.p_rx____valid.set(valid);
        top_.p_rx____payload.set(payload);
    }
    void r_idle() { top_.p_bus____rvalid.set(false); }
    void r_beat(const uint8_t *data, uint8_t resp, bool last, uint8_t id) {
        top_.p_bus____rvalid.set(true);
        std::memcpy(top_.p_bus____rdata.data, data, PRESTAGE_DATA_BYTES);
        top_.p_bus____rresp.set(resp);
        top_.p_bus____rlast.set(last);
        top_.p_bus____rid.set(id);
    }
    void reads(bool valid, uint64_t payload) {
        top_.p_reads____valid.set(valid);
        std::memcpy(top_.p_reads____payload.data, &payload, sizeof top_.p_reads____payload.data);
    }

    // Outputs.
    bool rx_ready() const { return bit(top_.p_rx____ready); }
    bool tx_valid() const { return bit(top_.p_tx____valid); }
    uint8_t tx_payload() const { return number<uint8_t>(top_.p_tx____payload); }
    bool arvalid() const { return bit(top_.p_bus____arvalid); }
    uint64_t araddr() const { return number<uint64_t>(top_.p_bus____araddr); }
    uint8_t arlen() const { return number<uint8_t>(top_.p_bus____arlen); }
    uint8_t arsize() const { return number<uint8_t>(top_.p_bus____arsize); }
    uint8_t arburst() const { return number<uint8_t>(top_.p_bus____arburst); }
    uint8_t arid() const { return number<uint8_t>(top_.p_bus____arid); }
    bool rready() const { return bit(top_.p_bus____rready); }
    bool reads_ready() const { return bit(top_.p_reads____ready); }
    bool beats_valid() const { return bit(top_.p_beats____valid); }
    const uint8_t *beats_payload() const { return bytes(top_.p_beats____payload); }

    void tick() {
        top_.p_clk.set(true);
        top_.step();
        top_.p_clk.set(false);
        top_.step();
    }

  private:
    // An output is a value or, where a register drives it, a wire.
    template <size_t Bits> static const uint8_t *bytes(const cxxrtl::value<Bits> &value) {
        return reinterpret_cast<const uint8_t *>(value.data);
    }
    template <size_t Bits> static const uint8_t *bytes(const cxxrtl::wire<Bits> &wire) { return bytes(wire.curr); }
    template <class Number, template <size_t> class Port, size_t Bits> static Number number(const Port<Bits> &port) {
        uint64_t result = 0;
        std::memcpy(&result, bytes(port), Bits <= 32 ? 4 : 8);
        return static_cast<Number>(result);
    }
    template <class Port> static bool bit(const Port &port) { return bytes(port)[0] & 1; }

    cxxrtl_design::p_top top_;
};

#endif
