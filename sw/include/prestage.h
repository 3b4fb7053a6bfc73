/* Generated from hw/prestage_hw/contract by python -m prestage_hw.contract.generate. */
/* SPDX-License-Identifier: BSD-2-Clause */

#ifndef PRESTAGE_H
#define PRESTAGE_H

#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The structures below have the layout of the wire only on little-endian machines"
#endif

/* Identity. The host compares the registers of these names with them. */
#define PRESTAGE_DEVICE_ID 0x50525354u
#define PRESTAGE_VERSION 0x00000002u
#define PRESTAGE_REGISTER_HASH 0x5e85392cu

/*
 * A frame is type, sequence, acknowledge (one byte each), the body and the CRC-32 of
 * IEEE 802.3 over all of them, least significant byte first; stuffed with COBS, ended by
 * a zero byte.
 */
#define PRESTAGE_FRAME_OVERHEAD 7u
#define PRESTAGE_MAX_FRAME_BYTES 253u

/* Words of a predictor table in one message. */
#define PRESTAGE_TABLE_BURST 4u
/* Messages other than FETCHED that a device with a host mover has room for. */
#define PRESTAGE_HOST_MESSAGES 64u

/* Token id where it isn't known. */
#define PRESTAGE_NO_TOKEN 0xffffffffu

/* Types of frames. */
enum prestage_message {
    PRESTAGE_REGISTER_READ = 0x01, /* to the device */
    PRESTAGE_REGISTER_WRITE = 0x02, /* to the device */
    PRESTAGE_TABLE_READ = 0x03, /* to the device */
    PRESTAGE_TABLE_WRITE = 0x04, /* to the device */
    PRESTAGE_BEGIN_TOKEN = 0x10, /* to the device */
    PRESTAGE_ROUTE = 0x11, /* to the device */
    PRESTAGE_HINT = 0x12, /* to the device */
    PRESTAGE_RELEASE = 0x13, /* to the device */
    PRESTAGE_READ = 0x14, /* to the device */
    PRESTAGE_SYNC = 0x15, /* to the device */
    PRESTAGE_LOCK = 0x16, /* to the device */
    PRESTAGE_FETCHED = 0x17, /* to the device */
    PRESTAGE_REPLICATE = 0x18, /* to the device */
    PRESTAGE_WRITE = 0x19, /* to the device */
    PRESTAGE_LINK_RESET = 0x7c, /* to the device */
    PRESTAGE_LINK_RESET_DONE = 0x7d, /* to the host */
    PRESTAGE_LINK_ACK = 0x7e, /* both ways */
    PRESTAGE_LINK_NAK = 0x7f, /* both ways */
    PRESTAGE_REGISTER_VALUE = 0x81, /* to the host */
    PRESTAGE_TABLE_DATA = 0x83, /* to the host */
    PRESTAGE_READY = 0x90, /* to the host */
    PRESTAGE_EVENT = 0x91, /* to the host */
    PRESTAGE_DATA = 0x94, /* to the host */
    PRESTAGE_SYNCED = 0x95, /* to the host */
    PRESTAGE_FETCH = 0x96, /* to the host */
    PRESTAGE_COPY = 0x97, /* to the host */
};

enum prestage_phase {
    PRESTAGE_PHASE_PREFILL = 0,
    PRESTAGE_PHASE_DECODE = 1,
    PRESTAGE_PHASE_VERIFY = 2,
};

enum prestage_source {
    PRESTAGE_SOURCE_PREDICTOR = 0,
    PRESTAGE_SOURCE_HINT = 1,
};

enum prestage_error_code {
    PRESTAGE_ERROR_CODE_BAD_CONTEXT = 1, /* The context number is not below the number of contexts. */
    PRESTAGE_ERROR_CODE_BAD_LAYER = 2, /* The layer number is not below the number of layers. */
    PRESTAGE_ERROR_CODE_BAD_EXPERT = 3, /* An expert number is not below the number of experts. */
    PRESTAGE_ERROR_CODE_DUPLICATE_EXPERT = 4, /* An expert occurs twice in one routing decision. */
    PRESTAGE_ERROR_CODE_UNRELEASED = 5, /* The layer was routed again before it was released. */
    PRESTAGE_ERROR_CODE_UNROUTED = 6, /* The layer was released without having been routed. */
    PRESTAGE_ERROR_CODE_NO_SLOT = 7, /* Every slot is pinned or locked and nothing is in flight, or no more experts may be locked. */
    PRESTAGE_ERROR_CODE_BUS = 8, /* The memory answered a read with an error, or the host could not copy. */
    PRESTAGE_ERROR_CODE_BAD_MESSAGE = 9, /* The message type is unknown or its body has the wrong length. */
    PRESTAGE_ERROR_CODE_BAD_REGISTER = 10, /* No register has that address, or it is read-only. */
    PRESTAGE_ERROR_CODE_BAD_READ = 11, /* The slot or the beat of a read is out of range, or slots are the host's. */
    PRESTAGE_ERROR_CODE_HINT_PASSED = 12, /* The hint is for a layer that was routed already. */
    PRESTAGE_ERROR_CODE_BAD_TABLE = 13, /* The table or the words of a table access are out of range. */
    PRESTAGE_ERROR_CODE_NOT_LOCKED = 14, /* The expert was unlocked without having been locked. */
    PRESTAGE_ERROR_CODE_SLOT_MEMORY = 15, /* The slots' memory answered a write with an error. */
    PRESTAGE_ERROR_CODE_CHECKSUM = 16, /* The expert's bytes do not have the checksum that was loaded for it. */
    PRESTAGE_ERROR_CODE_BAD_FETCHED = 17, /* The host reported a tile that it was not asked for, or twice, or did not write whole. */
    PRESTAGE_ERROR_CODE_OVERRUN = 18, /* More messages wait than the device has room for; this one was dropped. */
    PRESTAGE_ERROR_CODE_BAD_COPIES = 19, /* The number of copies is 0 or more than the device has banks. */
    PRESTAGE_ERROR_CODE_NOT_HELD = 20, /* The copy was not made, because the expert itself is not held. */
    PRESTAGE_ERROR_CODE_TIMEOUT = 21, /* The memory did not answer a read in time, or the host a fetch. */
    PRESTAGE_ERROR_CODE_ABORTED = 22, /* The host aborted the transfer. */
    PRESTAGE_ERROR_CODE_ADDRESS = 23, /* The expert, or a row of it, would go past the top of the address space. */
};

enum prestage_traffic_class {
    PRESTAGE_TRAFFIC_CLASS_DEMAND = 0,
    PRESTAGE_TRAFFIC_CLASS_PREFETCH = 1,
    PRESTAGE_TRAFFIC_CLASS_STREAM = 2,
};

enum prestage_refusal {
    PRESTAGE_REFUSAL_NONE = 0, /* Nothing was refused. */
    PRESTAGE_REFUSAL_CHANNEL = 1, /* The DMA engine has no such channel. */
    PRESTAGE_REFUSAL_TRAFFIC = 2, /* There is no such traffic class. */
    PRESTAGE_REFUSAL_WEIGHT = 3, /* The weight is 0. */
    PRESTAGE_REFUSAL_BURST = 4, /* The burst length is no power of two, or longer than the longest burst. */
    PRESTAGE_REFUSAL_CREDITS = 5, /* A channel has no credit, or there are more credits than bursts outstanding. */
    PRESTAGE_REFUSAL_ROWS = 6, /* Size or stride of a row is no whole number of beats, or too large; any size where the device's configuration says what rows experts have. */
    PRESTAGE_REFUSAL_ENABLE = 7, /* Channels 0 and 1, and the last of three or more, carry demands and prefetches and can't be disabled. */
    PRESTAGE_REFUSAL_PROFILE = 8, /* No phase has that number. */
    PRESTAGE_REFUSAL_BUDGET = 9, /* A budget is at most 8 eighths. */
    PRESTAGE_REFUSAL_RESCAN = 10, /* A rescan needs a predictor that gives values, looks at most at all layers and at most at 127, and asks for a confidence of 1 to 255. */
    PRESTAGE_REFUSAL_VALUE = 11, /* The register can't hold that value. */
    PRESTAGE_REFUSAL_BASE = 12, /* The array that begins there must begin at a multiple of its step and end below the top of the address space, the device must have it, and the low half is written first. */
};

/* Register addresses, in 32-bit words. */
enum prestage_register {
    PRESTAGE_REG_DEVICE_ID = 0x00, /* ro: The letters "PRST". */
    PRESTAGE_REG_VERSION = 0x01, /* ro: Version of the contract: major 31..16, minor 15..0. */
    PRESTAGE_REG_REGISTER_HASH = 0x02, /* ro: CRC-32 of the register list; the driver checks it. */
    PRESTAGE_REG_LAYERS = 0x03, /* ro: MoE layers (L). */
    PRESTAGE_REG_EXPERTS = 0x04, /* ro: Experts a layer (E). */
    PRESTAGE_REG_TOP_K = 0x05, /* ro: Experts chosen for each token and layer (k). */
    PRESTAGE_REG_SLOTS = 0x06, /* ro: Slots of the expert buffer (S). */
    PRESTAGE_REG_EXPERT_BYTES = 0x07, /* ro: Size of a slot, and so of the largest expert, in bytes. */
    PRESTAGE_REG_TILE_BYTES = 0x08, /* ro: Size of a tile, in bytes. */
    PRESTAGE_REG_CONTEXTS = 0x09, /* ro: Contexts (C). */
    PRESTAGE_REG_PREDICTOR = 0x0a, /* ro: Predictor: index in the list of names, 0 none, 1 st_moe. */
    PRESTAGE_REG_SUCCESSORS = 0x0b, /* ro: Entries in a row of the correlation table (K). */
    PRESTAGE_REG_DATA_BYTES = 0x0c, /* ro: Width of the memory port, in bytes. */
    PRESTAGE_REG_MOVER = 0x0d, /* ro: Who moves experts into slots: 0 the DMA engine, 1 the host. */
    PRESTAGE_REG_LAYER_SIZES = 0x0e, /* ro: CRC-32 of the tiles of an expert of each layer, as 32-bit little-endian numbers, where experts of different layers differ in size, or of the four numbers of the rows of each part, as 64-bit ones, where parts have rows; else 0. */
    PRESTAGE_REG_CONTROL = 0x10, /* rw: Bit 0: prefetch from the predictor's candidates. Bit 1: prefetch from hints. Bit 2: a candidate waits until the predictor is at rest and nothing is in flight, so that what is evicted for it does not hang on time. Bit 3: candidates of a kind that costs more than it saves are dropped. Bit 4: a prefetch in flight is given up at a tile's edge once its layer was routed, or for a demand that finds no slot. Bit 5: the phase of BEGIN_TOKEN asks for its profile. Bits 0 and 1 are those of the profile that profile_select names. */
    PRESTAGE_REG_CLEAR = 0x11, /* wo: Write ones to clear. Bit 0: predictor tables. Bit 1: buffer (all slots become free, every layer released). Bit 2: counters. Bit 3: checksums of experts, so that none is checked. Waits until the engine is idle. */
    PRESTAGE_REG_HINT_THRESHOLD = 0x12, /* rw: Hints with a lower score are dropped (bits 7..0). */
    PRESTAGE_REG_EXPERT_BASE_LOW = 0x13, /* rw: Address of (part 0 of) expert 0 of layer 0, bits 31..0. Of each address the low half is written first, and where addresses have more than 32 bits it holds from the write of the high half on, with that. */
    PRESTAGE_REG_EXPERT_BASE_HIGH = 0x14, /* rw: Address of (part 0 of) expert 0 of layer 0, bits 63..32. */
    PRESTAGE_REG_PREFETCH_TILES = 0x15, /* rw: Prefetch tiles that the DMA may hold at once, 1 to 4. */
    PRESTAGE_REG_PREDICT_THRESHOLD = 0x16, /* rw: Least confidence of a candidate for the next layer, in 1/256 (bits 7..0). */
    PRESTAGE_REG_PREDICT_FAR_THRESHOLD = 0x17, /* rw: Least confidence of a candidate for a layer after the next, in 1/256 (bits 7..0). */
    PRESTAGE_REG_PREDICT_AHEAD = 0x18, /* rw: Layers, from layer 0 on, that are proposed when a token starts (bits 7..0). */
    PRESTAGE_REG_TABLE_ADDRESS = 0x19, /* rw: Table word for table_data: table in bits 31..24, word in bits 23..0. Table 255 holds the experts' checksums, table 254 the statistics of prefetches. */
    PRESTAGE_REG_TABLE_DATA = 0x1a, /* rw: The addressed table word; each access moves table_address one word on. */
    PRESTAGE_REG_TABLE_WORDS = 0x1b, /* ro: Words in the table that table_address selects. */
    PRESTAGE_REG_TOKEN_BASE_LOW = 0x1c, /* rw: Address of the predictor's token tables where they lie behind a memory port, bits 31..0: a multiple of 4096. */
    PRESTAGE_REG_TOKEN_BASE_HIGH = 0x1d, /* rw: The same, bits 63..32. */
    PRESTAGE_REG_POLICY = 0x1e, /* rw: Which expert gives way to another: 0 LRU, 1 LFU, 2 NEXT_USE. */
    PRESTAGE_REG_CYCLES_LOW = 0x20, /* ro: Clock cycles since reset, bits 31..0; latches the rest. */
    PRESTAGE_REG_CYCLES_HIGH = 0x21, /* ro: Clock cycles since reset, bits 63..32, as latched. */
    PRESTAGE_REG_THROTTLE = 0x22, /* rw: What the throttle reckons with. Bits 3..0: worth of a useful prefetch; 7..4: price of each prefetch, paid back when it is used; 11..8: cost of a demand that misses because of prefetches; 15..12: cost of a demand that waits for a prefetch's tile; 22..16: below minus that credit a kind is switched off, to be switched on again at 0; 27..24: binary logarithm of the most demand misses from one probe to the next, at least 4. */
    PRESTAGE_REG_THROTTLE_STATE = 0x23, /* ro: Credit of the kinds near, far and hint in bits 7..0, 15..8 and 23..16, signed; bits 24 to 26: they are switched on. */
    PRESTAGE_REG_PROFILE = 0x24, /* rw: Phase whose profile is asked for: 0 PREFILL, 1 DECODE, 2 VERIFY. It becomes active as a whole, its DMA channels included, at the next layer boundary, at once if nothing is under way; a write of the active one makes its DMA channels active. */
    PRESTAGE_REG_PROFILE_ACTIVE = 0x25, /* ro: Phase whose profile is active. */
    PRESTAGE_REG_PROFILE_SELECT = 0x26, /* rw: Profile that these registers belong to: control (bits 0 and 1), prefetch_tiles, predict_threshold, predict_far_threshold, predict_ahead, cutoff_layer, budget, rescan_ahead, rescan_least, dma_lower_credits, dma_shape, dma_row_bytes, dma_row_stride. Writes for the active one hold at once, but for those of the DMA. */
    PRESTAGE_REG_CUTOFF_LAYER = 0x27, /* rw: Candidates for this layer and those above are dropped (bits 7..0); 255: none are. */
    PRESTAGE_REG_DMA_LOWER_CREDITS = 0x28, /* rw: Most bursts outstanding in the classes below demand; 0: as many as hold a tile. */
    PRESTAGE_REG_DMA_CHANNEL = 0x29, /* rw: DMA channel of dma_shape, dma_row_bytes, dma_row_stride and the channel_ counters. */
    PRESTAGE_REG_DMA_SHAPE = 0x2a, /* rw: Bit 0: the channel is enabled. Bits 5..4: traffic class; 11..8: weight; 16..12: credits; 28..20: longest burst, in beats. */
    PRESTAGE_REG_DMA_ROW_BYTES = 0x2b, /* rw: Bytes of a row if tiles are gathered from rows, else 0. */
    PRESTAGE_REG_DMA_ROW_STRIDE = 0x2c, /* rw: Bytes from the start of a row to the start of the next, below 16,777,216. */
    PRESTAGE_REG_REFUSAL = 0x2d, /* rw: What was wrong with the first write that was refused, which has changed nothing. Bit 31: a write was refused. Bits 23..8: address of its register. Bits 7..0: a Refusal. Any write clears it. */
    PRESTAGE_REG_DMA_TIMEOUT = 0x2e, /* rw: Cycles that a DMA channel waits for the memory, or a fetch for the host, before its tiles fail, 4 to 16,777,215; 0: for ever. */
    PRESTAGE_REG_DMA_ABORT = 0x2f, /* wo: A write aborts all tiles that the DMA engine was asked for: their experts' fetches fail. */
    PRESTAGE_REG_PART1_BASE_LOW = 0x30, /* rw: Address of part 1 of expert 0 of layer 0, bits 31..0. After reset the parts' arrays follow each other from address 0 on; 0 where experts have no such part. */
    PRESTAGE_REG_PART1_BASE_HIGH = 0x31, /* rw: Address of part 1 of expert 0 of layer 0, bits 63..32. */
    PRESTAGE_REG_PART2_BASE_LOW = 0x32, /* rw: Address of part 2 of expert 0 of layer 0, bits 31..0. After reset the parts' arrays follow each other from address 0 on; 0 where experts have no such part. */
    PRESTAGE_REG_PART2_BASE_HIGH = 0x33, /* rw: Address of part 2 of expert 0 of layer 0, bits 63..32. */
    PRESTAGE_REG_PART3_BASE_LOW = 0x34, /* rw: Address of part 3 of expert 0 of layer 0, bits 31..0. After reset the parts' arrays follow each other from address 0 on; 0 where experts have no such part. */
    PRESTAGE_REG_PART3_BASE_HIGH = 0x35, /* rw: Address of part 3 of expert 0 of layer 0, bits 63..32. */
    PRESTAGE_REG_PART0_BYTES = 0x36, /* ro: Size of part 0 of an expert, in bytes, 0 if there is none. */
    PRESTAGE_REG_PART1_BYTES = 0x37, /* ro: Size of part 1 of an expert, in bytes, 0 if there is none. */
    PRESTAGE_REG_PART2_BYTES = 0x38, /* ro: Size of part 2 of an expert, in bytes, 0 if there is none. */
    PRESTAGE_REG_PART3_BYTES = 0x39, /* ro: Size of part 3 of an expert, in bytes, 0 if there is none. */
    PRESTAGE_REG_SLOT_BASE_LOW = 0x3a, /* rw: Address of slot 0 where slots are in a memory behind an AXI4 write port, bits 31..0: a multiple of 4096. */
    PRESTAGE_REG_SLOT_BASE_HIGH = 0x3b, /* rw: The same, bits 63..32. */
    PRESTAGE_REG_FEATURES = 0x3c, /* ro: What the device has. Bit 0: slots are in a memory behind an AXI4 write port. Bit 1: checksums of experts. Bit 2: the host writes slots. Bits 15..8: copies that an expert may have beside itself. */
    PRESTAGE_REG_BUDGET = 0x3d, /* rw: Eighths of a prefetch's tiles that must be expected before its deadline, 1 to 8, or it is dropped; 0: none is. No effect while control bit 2 is set. */
    PRESTAGE_REG_LAYER_TIME = 0x3e, /* ro: Cycles from one routing decision of a context to the next: a mean with the weight 1/8 for the last one; 0 before there are two, and 16,777,216 or more do not count. */
    PRESTAGE_REG_TILE_TIME = 0x3f, /* ro: Cycles that the DMA engine, or the host, takes for a tile while it has any: a mean like that; 0 before there is one. */
    PRESTAGE_REG_TOKENS = 0x40, /* ro: Tokens begun. Stage 1. */
    PRESTAGE_REG_ROUTES = 0x41, /* ro: Routing decisions accepted. Stage 1. */
    PRESTAGE_REG_RELEASES = 0x42, /* ro: Layers released. Stage 1. */
    PRESTAGE_REG_HINTS = 0x43, /* ro: Hints accepted. Stage 1. */
    PRESTAGE_REG_REJECTED = 0x44, /* ro: Messages refused with an Event. Stage 1. */
    PRESTAGE_REG_CANDIDATES = 0x45, /* ro: Experts that the predictor proposed for the layer that comes next. Stage 2. */
    PRESTAGE_REG_CANDIDATES_CORRECT = 0x46, /* ro: Proposed experts that the layer then chose. Stage 2. */
    PRESTAGE_REG_DEMANDS_PREDICTED = 0x47, /* ro: Demands at layers for which the predictor could propose experts. Stage 2. */
    PRESTAGE_REG_PARITY_ERRORS = 0x48, /* ro: Words of predictor tables that were read with wrong parity, and errors that their memory answered. Stage 2. */
    PRESTAGE_REG_DEMANDS = 0x49, /* ro: Experts demanded. Stage 3. */
    PRESTAGE_REG_HITS = 0x4a, /* ro: Demands that found their expert resident. Stage 3. */
    PRESTAGE_REG_MISSES = 0x4b, /* ro: Demands that had to start a fetch. Stage 3. */
    PRESTAGE_REG_LATE = 0x4c, /* ro: Demands that found their expert in flight as a prefetch. Stage 3. */
    PRESTAGE_REG_MERGED = 0x4d, /* ro: Demands that found their expert in flight as a demand. Stage 3. */
    PRESTAGE_REG_REFUSED = 0x4e, /* ro: Demands that found every slot pinned. Stage 3. */
    PRESTAGE_REG_LOCKS = 0x4f, /* ro: Experts that the host locked. Stage 3. */
    PRESTAGE_REG_LOCK_MISSES = 0x50, /* ro: Locks that had to start a fetch. Stage 3. */
    PRESTAGE_REG_PREFETCH_ISSUED = 0x51, /* ro: Prefetches started. Stage 3. */
    PRESTAGE_REG_PREFETCH_REDUNDANT = 0x52, /* ro: Candidates found resident or in flight. Stage 3. */
    PRESTAGE_REG_PREFETCH_STALE = 0x53, /* ro: Candidates whose layer had been routed. Stage 3. */
    PRESTAGE_REG_PREFETCH_NO_SLOT = 0x54, /* ro: Candidates that found no slot to take. Stage 3. */
    PRESTAGE_REG_PREFETCH_OUTBID = 0x55, /* ro: Candidates that were worth less than every expert that could give way. Stage 3. */
    PRESTAGE_REG_PREFETCH_OVERFLOW = 0x56, /* ro: Candidates lost to a full queue. Stage 3. */
    PRESTAGE_REG_PREFETCH_THROTTLED = 0x57, /* ro: Candidates of a kind that has cost more than it has saved. Stage 3. */
    PRESTAGE_REG_PREFETCH_CANCELLED = 0x58, /* ro: Prefetches in flight that were given up because their layer was routed, or for a demand that found no slot. Stage 3. */
    PRESTAGE_REG_USEFUL = 0x59, /* ro: Prefetched experts demanded or locked before eviction. Stage 5. */
    PRESTAGE_REG_USELESS = 0x5a, /* ro: Prefetched experts evicted without a demand. Stage 5. */
    PRESTAGE_REG_EVICTIONS = 0x5b, /* ro: Experts evicted. Stage 5. */
    PRESTAGE_REG_POLLUTION = 0x5c, /* ro: Demand misses on an expert that a prefetch evicted. Stage 5. */
    PRESTAGE_REG_FILLS = 0x5d, /* ro: Experts that arrived whole. Stage 5. */
    PRESTAGE_REG_FILL_ERRORS = 0x5e, /* ro: Fetches that ended in an error. Stage 5. */
    PRESTAGE_REG_DEMAND_BYTES_LOW = 0x5f, /* ro: Bytes fetched for demands. Stage 4. Bits 31..0; latches the rest. */
    PRESTAGE_REG_DEMAND_BYTES_HIGH = 0x60, /* ro: Bytes fetched for demands. Stage 4. Bits 63..32, as latched. */
    PRESTAGE_REG_PREFETCH_BYTES_LOW = 0x61, /* ro: Bytes fetched for prefetches. Stage 4. Bits 31..0; latches the rest. */
    PRESTAGE_REG_PREFETCH_BYTES_HIGH = 0x62, /* ro: Bytes fetched for prefetches. Stage 4. Bits 63..32, as latched. */
    PRESTAGE_REG_LINK_ERRORS = 0x63, /* ro: Damaged frames received. Stage 1. */
    PRESTAGE_REG_LINK_REPLAYS = 0x64, /* ro: Times the link went back to resend. Stage 1. */
    PRESTAGE_REG_CHECKSUM_ERRORS = 0x65, /* ro: Experts that arrived whole but not with the checksum loaded for them. Stage 4. */
    PRESTAGE_REG_PREFETCH_LATE_DROPPED = 0x66, /* ro: Candidates of which less than the budget would have come in time. Stage 3. */
    PRESTAGE_REG_ROUTES_OUT_OF_ORDER = 0x67, /* ro: Routing decisions, served all the same, for a layer below the last one that the context had routed in its token. Stage 1. */
    PRESTAGE_REG_WRITES_REFUSED = 0x68, /* ro: Beats that the host wrote to no tile that it was asked for, and that changed nothing. Stage 5. */
    PRESTAGE_REG_CHANNEL_TILES = 0xa0, /* ro: Tiles that came whole. Of the channel that dma_channel names. Stage 4. */
    PRESTAGE_REG_CHANNEL_ERRORS = 0xa1, /* ro: Tiles that ended in an error, but for those aborted. Of the channel that dma_channel names. Stage 4. */
    PRESTAGE_REG_CHANNEL_ABORTED = 0xa2, /* ro: Tiles that were aborted. Of the channel that dma_channel names. Stage 4. */
    PRESTAGE_REG_CHANNEL_BEATS = 0xa3, /* ro: Beats that went to the buffer. Of the channel that dma_channel names. Stage 4. */
    PRESTAGE_REG_CHANNEL_BUSY = 0xa4, /* ro: Cycles in which tiles waited or were under way. Of the channel that dma_channel names. Stage 4. */
    PRESTAGE_REG_CHANNEL_STALL = 0xa5, /* ro: Cycles in which a burst wanted to leave and could not. Of the channel that dma_channel names. Stage 4. */
    PRESTAGE_REG_RESCAN_AHEAD = 0xa8, /* rw: Layers, from the one after a context's latest routing decision on, whose values are looked through for what is worth a prefetch: at most L, and 127. It takes the place of the predictor's candidates, which are dropped; 0: none are looked through. Only where the predictor gives values. */
    PRESTAGE_REG_RESCAN_LEAST = 0xa9, /* rw: Least confidence of what such a rescan finds, in 1/256: 1 to 255. */
};

/* Bodies of the messages. */
#pragma pack(push, 1)

/* Ask for a register. */
struct prestage_register_read {
    uint16_t register_; /* Register address, in 32-bit words. */
};

/* Write a register. */
struct prestage_register_write {
    uint16_t register_; /* Register address, in 32-bit words. */
    uint32_t value; /* Register value. */
};

/* Read words of a predictor table, one at a time while the engine is idle. */
struct prestage_table_read {
    uint8_t table; /* Table number. */
    uint32_t word; /* Word within the table. */
    uint16_t count; /* Words to read, 4 in an answer. */
};

/* Write words of a predictor table, one at a time while the engine is idle. */
struct prestage_table_write {
    uint8_t table; /* Table number. */
    uint32_t word; /* Word within the table. */
    uint8_t count; /* Words to write, 1 to 4. */
    uint32_t values[4]; /* The words; those past count mean nothing. */
};

/* A token starts; its id is known before layer 0 runs. */
struct prestage_begin_token {
    uint8_t ctx; /* Context (sequence) number. */
    uint8_t phase; /* A Phase; any other number counts as DECODE. */
    uint32_t token; /* Id of the input token, 0xFFFFFFFF where unknown. */
};

/* The router's choice for one layer, as the host sends it. */
/* Followed by uint16_t experts[top_k]. */
struct prestage_route_head {
    uint8_t ctx; /* Context (sequence) number. */
    uint8_t layer; /* MoE layer, from 0. */
};

/* An opinion from outside about a layer to come. */
struct prestage_hint {
    uint8_t ctx; /* Context (sequence) number. */
    uint8_t layer; /* MoE layer, from 0. */
    uint16_t expert; /* Expert within the layer. */
    uint8_t score; /* Confidence, 255 is certain. */
};

/* The consumer is done with a layer of a context. */
struct prestage_release {
    uint8_t ctx; /* Context (sequence) number. */
    uint8_t layer; /* MoE layer, from 0. */
};

/* Read beats of a slot over the link. */
struct prestage_read {
    uint16_t slot; /* Slot of the expert buffer. */
    uint32_t beat; /* Beat within the slot. */
    uint16_t count; /* Beats to read. */
};

/* Answer when everything before this is done and the engine is idle. */
struct prestage_sync {
    uint16_t tag; /* Echoed by the answer. */
};

/* Keep an expert in the buffer, say a shared one, or no longer. */
struct prestage_lock {
    uint8_t ctx; /* Context (sequence) number. */
    uint8_t layer; /* MoE layer, from 0. */
    uint16_t expert; /* Expert within the layer. */
    uint8_t lock; /* 1: fetch it if it is missing, answer with a Ready of this context, and never evict it; 0: it may be evicted again. */
};

/* The host has copied a tile, or could not. */
struct prestage_fetched {
    uint8_t tag; /* Entry of the in-flight table. */
    uint16_t serial; /* Number of the fetch, modulo 65,536; all tiles of an expert have the same. */
    uint16_t tile; /* Tile within the expert. */
    uint8_t failed; /* 0: the tile is in the slot, else it is not. */
};

/* Hold so many copies of an expert, each in a bank of its own. */
struct prestage_replicate {
    uint8_t ctx; /* Context (sequence) number. */
    uint8_t layer; /* MoE layer, from 0. */
    uint16_t expert; /* Expert within the layer. */
    uint8_t copies; /* 1 to the device's replicas. From 2 on the expert itself is held, too, and each of them is answered by a Copy or an Event of this context; 1 gives all of them back, without an answer. */
};

/* One beat of an arriving expert. */
/* Followed by uint8_t data[data_bytes]. */
struct prestage_buffer_write_head {
    uint16_t slot; /* Slot of the expert buffer. */
    uint32_t beat; /* Beat within the slot. */
};

/* A register's value. */
struct prestage_register_value {
    uint16_t register_; /* Register address, in 32-bit words. */
    uint32_t value; /* Register value. */
};

/* Words of a predictor table. */
struct prestage_table_data {
    uint8_t table; /* Table number. */
    uint32_t word; /* Word within the table. */
    uint32_t values[4]; /* The words from there on; 0 past the last that was asked for. */
};

/* The slot holds exactly this expert's bytes until the layer is released. */
struct prestage_ready {
    uint8_t ctx; /* Context (sequence) number. */
    uint8_t layer; /* MoE layer, from 0. */
    uint16_t expert; /* Expert within the layer. */
    uint16_t slot; /* Slot of the expert buffer. */
};

/* An error, with what it is about; fields that do not apply are 0. */
struct prestage_event {
    uint8_t code; /* An ErrorCode. */
    uint8_t ctx; /* Context number. */
    uint8_t layer; /* MoE layer. */
    uint16_t expert; /* Expert. */
    uint64_t address; /* Memory address, in bytes. */
};

/* One beat of a slot, as it goes over the link. */
/* Followed by uint8_t data[data_bytes], uint8_t ok. */
struct prestage_data_head {
    uint16_t slot; /* Slot of the expert buffer. */
    uint32_t beat; /* Beat within the slot. */
};

/* The answer to Sync. */
struct prestage_synced {
    uint16_t tag; /* Echoed by the answer. */
};

/* Ask the host to copy one tile of an expert into a slot. */
struct prestage_fetch {
    uint8_t tag; /* Entry of the in-flight table. */
    uint16_t serial; /* Number of the fetch, modulo 65,536; all tiles of an expert have the same. */
    uint8_t demand; /* 1: demand, 0: prefetch. */
    uint8_t layer; /* MoE layer, from 0. */
    uint16_t expert; /* Expert within the layer. */
    uint16_t slot; /* Slot of the expert buffer. */
    uint16_t tile; /* Tile within the expert. */
};

/* The slot holds exactly this expert's bytes until fewer copies are asked for. */
struct prestage_copy {
    uint8_t ctx; /* Context (sequence) number. */
    uint8_t layer; /* MoE layer, from 0. */
    uint16_t expert; /* Expert within the layer. */
    uint8_t copy; /* Number of the copy; 0 is the expert itself. */
    uint16_t slot; /* Slot of the expert buffer. */
};

#pragma pack(pop)

#endif
