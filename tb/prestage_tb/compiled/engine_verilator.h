// The design as Verilator compiles it. Outputs are those of the present cycle, inputs those of the
// next one, which tick() begins.

#ifndef PRESTAGE_ENGINE_VERILATOR_H
#define PRESTAGE_ENGINE_VERILATOR_H

#include <cstdint>
#include <cstring>

#include "Vtop.h"
#include "Vtop___024root.h"
#include "verilated.h"

class Design {
  public:
    Design() : top_{new Vtop{&context_, ""}} {
        top_->clk = 0;
        top_->tx___05Fready = 1;
        top_->bus___05Farready = 1;
        top_->beats___05Fready = 1;
        top_->eval();
#ifdef PRESTAGE_SINGLE_EVAL
        top_->clk = 1;
#endif
    }
    ~Design() { delete top_; }
    Design(const Design &) = delete;
    Design &operator=(const Design &) = delete;

    // Inputs.
    void rst(bool on) { top_->rst = on; }
    void rx(bool valid, uint8_t payload) {
        top_->rx___05Fvalid = valid;
        top_->rx___05Fpayload = payload;
    }
    void r_idle() { top_->bus___05Frvalid = 0; }
    void r_beat(const uint8_t *data, uint8_t resp, bool last, uint8_t id) {
        top_->bus___05Frvalid = 1;
        std::memcpy(&top_->bus___05Frdata, data, PRESTAGE_DATA_BYTES);
        top_->bus___05Frresp = resp;
        top_->bus___05Frlast = last;
        top_->bus___05Frid = id;
    }
    void reads(bool valid, uint64_t payload) {
        top_->reads___05Fvalid = valid;
        std::memcpy(&top_->reads___05Fpayload, &payload, sizeof top_->reads___05Fpayload);
    }

    // Outputs.
    bool rx_ready() const { return top_->rx___05Fready; }
    bool tx_valid() const { return top_->tx___05Fvalid; }
    uint8_t tx_payload() const { return top_->tx___05Fpayload; }
    bool arvalid() const { return top_->bus___05Farvalid; }
    uint64_t araddr() const { return top_->bus___05Faraddr; }
    uint8_t arlen() const { return top_->bus___05Farlen; }
    uint8_t arsize() const { return top_->bus___05Farsize; }
    uint8_t arburst() const { return top_->bus___05Farburst; }
    uint8_t arid() const { return top_->bus___05Farid; }
    bool rready() const { return top_->bus___05Frready; }
    bool reads_ready() const { return top_->reads___05Fready; }
    bool beats_valid() const { return top_->beats___05Fvalid; }
    // The beat's bytes, then one byte whose lowest bit is `ok`.
    const uint8_t *beats_payload() const { return reinterpret_cast<const uint8_t *>(&top_->beats___05Fpayload); }

    void tick() {
#ifdef PRESTAGE_SINGLE_EVAL
        // clk stays 1 and Verilator is told that it was 0: half the evaluations, and no logic here minds the falling edge.
        top_->rootp->__Vtrigprevexpr___TOP__clk__0 = 0;
        top_->eval();
#else
        top_->clk = 1;
        top_->eval();
        top_->clk = 0;
        top_->eval();
#endif
    }

  private:
    VerilatedContext context_;
    Vtop *top_;
};

#endif
