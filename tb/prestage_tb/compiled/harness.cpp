// The harness around the design: link, memory and consumer port, all synchronous to the one clock. See harness.h.

#include "harness.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#ifdef PRESTAGE_CXXRTL
#include "engine_cxxrtl.h"
#else
#include "engine_verilator.h"
#endif

namespace {

constexpr uint64_t kDataBytes = PRESTAGE_DATA_BYTES;
constexpr uint64_t kExpertBytes = PRESTAGE_EXPERT_BYTES;
constexpr unsigned kSlotBits = PRESTAGE_SLOT_BITS;

constexpr uint8_t kOkay = 0, kSlaveError = 2, kDecodeError = 3;
constexpr uint8_t kFixed = 0;

// Read addresses that the memory holds. A device has at most 16 bursts outstanding, so arready may always be high.
constexpr uint64_t kBursts = 64;

struct Burst {
    uint64_t start, address;
    uint32_t beats, beat, beat_bytes;
    bool fixed, failed;
    uint8_t id;
};

struct Range {
    uint64_t address, size;
};

}  // namespace

struct prestage {
    Design design;

    // Memory.
    const uint8_t *memory;
    uint64_t memory_bytes;
    uint64_t latency;
    // The bucket holds bytes x bandwidth_cycles, so that a fraction of a byte a cycle stays an integer.
    uint64_t credit_step, credit_beat, credit = 0;
    std::vector<Range> failing;
    Burst bursts[kBursts];
    uint64_t burst_head = 0, burst_tail = 0;
    bool r_valid = false;
    uint8_t beat_buffer[kDataBytes];

    // Link.
    std::vector<uint8_t> unsent;
    uint64_t unsent_at = 0;
    bool rx_valid = false;
    std::vector<uint8_t> received;
    uint64_t frames = 0;

    // Consumer port. Requests and beats are counted for good; those up to batch_start belong to reads that were replaced.
    std::vector<uint32_t> slots;
    std::vector<uint64_t> addresses, slot_beats;
    std::vector<uint8_t> verdicts;
    std::vector<uint8_t> slot_bytes = std::vector<uint8_t>(kExpertBytes);
    uint64_t asked = 0, asked_beat = 0;
    uint64_t answered = 0, answered_beat = 0;
    uint64_t requests = 0, beats = 0, batch_start = 0;
    bool reads_valid = false;

    uint64_t cycle = 0;
    std::vector<prestage_transfer> log;
    uint64_t logged = 0;

    void reset() {
        unsent.clear();
        unsent_at = 0;
        rx_valid = r_valid = reads_valid = false;
        received.clear();
        frames = 0;
        slots.clear();
        asked = asked_beat = answered = answered_beat = 0;
        requests = beats = batch_start = 0;
        burst_head = burst_tail = 0;
        credit = credit_beat;
        design.rx(false, 0);
        design.r_idle();
        design.reads(false, 0);
        design.rst(true);
        design.tick();
        design.tick();
        design.rst(false);
        design.tick();
        cycle = 0;
        logged = 0;
    }

    bool consumed() const { return answered == slots.size(); }

    bool reached(uint32_t until, uint64_t frames_wanted) const {
        return (!(until & PRESTAGE_UNTIL_SENT) || unsent_at == unsent.size()) &&
               (!(until & PRESTAGE_UNTIL_FRAMES) || frames >= frames_wanted) &&
               (!(until & PRESTAGE_UNTIL_CONSUMED) || consumed());
    }

    uint8_t respond(uint64_t address) const {
        if (address > memory_bytes || memory_bytes - address < kDataBytes) return kDecodeError;
        for (const Range &range : failing)
            if (address < range.address + range.size && range.address < address + kDataBytes) return kSlaveError;
        return kOkay;
    }

    // Offer the next beat to the edge to come, if its time has come and the bandwidth allows it.
    void offer() {
        if (burst_head == burst_tail) return;
        Burst &burst = bursts[burst_head % kBursts];
        if (cycle < burst.start + latency || credit < credit_beat) return;
        credit -= credit_beat;
        const uint64_t address = burst.fixed ? burst.address : burst.address + uint64_t{burst.beat} * burst.beat_bytes;
        const uint64_t aligned = address / kDataBytes * kDataBytes;
        const uint8_t resp = respond(aligned);
        burst.failed |= resp != kOkay;
        const bool last = burst.beat + 1 == burst.beats;
        if (resp == kOkay) {
            design.r_beat(memory + aligned, resp, last, burst.id);
        } else {
            std::memset(beat_buffer, 0, sizeof beat_buffer);
            design.r_beat(beat_buffer, resp, last, burst.id);
        }
        r_valid = true;
    }

    void take_beat() {
        Burst &burst = bursts[burst_head % kBursts];
        r_valid = false;
        design.r_idle();
        if (++burst.beat < burst.beats) return;
        log[logged++ % PRESTAGE_LOG_BURSTS] = {
            burst.start, cycle, burst.address, burst.beats * burst.beat_bytes, burst.failed};
        ++burst_head;
    }

    void take_consumer_beat() {
        if (++beats <= batch_start || consumed()) return;
        const uint8_t *payload = design.beats_payload();
        const uint64_t offset = answered_beat * kDataBytes;
        const uint64_t address = addresses[answered] + offset;
        std::memcpy(&slot_bytes[offset], payload, kDataBytes);
        if (!(payload[kDataBytes] & 1)) verdicts[answered] |= PRESTAGE_INVALID;
        if (address > memory_bytes || memory_bytes - address < kDataBytes ||
            std::memcmp(payload, memory + address, kDataBytes) != 0)
            verdicts[answered] |= PRESTAGE_DIFFERS;
        if (++answered_beat == slot_beats[answered]) {
            answered_beat = 0;
            ++answered;
        }
    }

    void offer_read() {
        reads_valid = asked < slots.size();
        design.reads(reads_valid, reads_valid ? slots[asked] | asked_beat << kSlotBits : 0);
    }

    // One clock cycle: its outputs and inputs tell what is handed over at the edge to come and so what is offered in the next cycle.
    // The design takes what is offered into registers at that same edge, see elaborate.py.
    void step() {
        const bool took_rx = rx_valid && design.rx_ready();
        const bool took_r = r_valid && design.rready();
        const bool took_read = reads_valid && design.reads_ready();
        if (design.tx_valid()) {
            const uint8_t byte = design.tx_payload();
            received.push_back(byte);
            frames += byte == 0;
        }
        if (design.beats_valid()) take_consumer_beat();
        if (design.arvalid() && burst_tail - burst_head < kBursts)
            bursts[burst_tail++ % kBursts] = {
                cycle,
                design.araddr(),
                design.arlen() + 1u,
                0,
                1u << design.arsize(),
                design.arburst() == kFixed,
                false,
                design.arid()};

        if (took_rx) ++unsent_at;
        if (took_rx || !rx_valid) {
            rx_valid = unsent_at < unsent.size();
            if (rx_valid || took_rx) design.rx(rx_valid, rx_valid ? unsent[unsent_at] : 0);
        }
        if (took_r) take_beat();
        ++cycle;
        // An idle memory saves no more than one beat's worth.
        credit = credit < credit_beat ? credit + credit_step : credit_beat;
        if (!r_valid) offer();
        if (took_read && ++requests > batch_start && ++asked_beat == slot_beats[asked]) {
            asked_beat = 0;
            ++asked;
        }
        if (took_read || (!reads_valid && asked < slots.size())) offer_read();

        design.tick();
    }
};

int prestage_abi(void) { return PRESTAGE_ABI; }

prestage *prestage_create(
    const uint8_t *memory, uint64_t memory_bytes, uint64_t latency, uint64_t bandwidth_bytes, uint64_t bandwidth_cycles) {
    if (!memory || !latency || !bandwidth_bytes || !bandwidth_cycles || bandwidth_cycles > UINT32_MAX ||
        bandwidth_bytes > kDataBytes * bandwidth_cycles)
        return nullptr;
    std::unique_ptr<prestage> device{new prestage};
    device->memory = memory;
    device->memory_bytes = memory_bytes;
    device->latency = latency;
    device->credit_step = bandwidth_bytes;
    device->credit_beat = kDataBytes * bandwidth_cycles;
    device->log.resize(PRESTAGE_LOG_BURSTS);
    device->reset();
    return device.release();
}

void prestage_destroy(prestage *device) { delete device; }

void prestage_reset(prestage *device) { device->reset(); }

void prestage_fail(prestage *device, uint64_t address, uint64_t size) { device->failing.push_back({address, size}); }

void prestage_push(prestage *device, const uint8_t *data, uint64_t count) {
    device->unsent.erase(device->unsent.begin(), device->unsent.begin() + static_cast<int64_t>(device->unsent_at));
    device->unsent_at = 0;
    device->unsent.insert(device->unsent.end(), data, data + count);
}

uint64_t prestage_unsent(const prestage *device) { return device->unsent.size() - device->unsent_at; }

uint64_t prestage_run(prestage *device, uint64_t cycles, uint32_t until, uint64_t frames) {
    uint64_t done = 0;
    for (; done < cycles; ++done) {
        if (until && device->reached(until, frames)) break;
        device->step();
    }
    return done;
}

uint64_t prestage_cycles(const prestage *device) { return device->cycle; }

uint64_t prestage_received(const prestage *device) { return device->received.size(); }

uint64_t prestage_frames(const prestage *device) { return device->frames; }

const uint8_t *prestage_data(const prestage *device) { return device->received.data(); }

void prestage_pop(prestage *device, uint64_t count) {
    const auto begin = device->received.begin();
    const auto end = begin + static_cast<int64_t>(std::min<uint64_t>(count, device->received.size()));
    device->frames -= static_cast<uint64_t>(std::count(begin, end, uint8_t{0}));
    device->received.erase(begin, end);
}

void prestage_consume(
    prestage *device, uint64_t count, const uint32_t *slots, const uint64_t *addresses, const uint64_t *beats) {
    // A request on offer must not change before it is taken, so it still belongs to what is replaced.
    device->batch_start = device->requests + device->reads_valid;
    device->slots.assign(slots, slots + count);
    device->addresses.assign(addresses, addresses + count);
    device->slot_beats.assign(beats, beats + count);
    device->verdicts.assign(count, 0);
    device->asked = device->asked_beat = device->answered = device->answered_beat = 0;
}

int prestage_consumed(const prestage *device) { return device->consumed(); }

const uint8_t *prestage_verdicts(const prestage *device) { return device->verdicts.data(); }

const uint8_t *prestage_slot_bytes(const prestage *device) { return device->slot_bytes.data(); }

uint64_t prestage_bursts(const prestage *device) { return device->logged; }

uint64_t prestage_transfers(const prestage *device, prestage_transfer *out, uint64_t count) {
    count = std::min({count, device->logged, uint64_t{PRESTAGE_LOG_BURSTS}});
    for (uint64_t n = 0; n < count; ++n) out[n] = device->log[(device->logged - count + n) % PRESTAGE_LOG_BURSTS];
    return count;
}
