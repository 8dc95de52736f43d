"""The arguments of the native layers: int64 words at fixed places. Sizes are counts, the rest addresses."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from kernels.jit import native
from kernels.simd import load_int, store_int

# Words of the frame.
COUNTERS, THREADS, ERROR, ROWS, SEQUENCES, BLOCK, BLOCK_PAGES, LAYERS, TABLE_WIDTH, ANGLES = range(10)
X, LAYER_TABLE, COS, SIN, POSITIONS, SEQUENCE_OF_ROW, SLOTS, PAGE_TABLE, ANCHORS = range(10, 19)
FEATURES, FEATURE_STRIDE, CAPTURE = range(19, 22)
NORMED, QKV, QUERIES, ATTENDED, GATE_UP, ACTIVATED, GROUPS, GROUP_COUNT, BLOCK_K, BLOCK_V = range(22, 32)
SCRATCH, SCRATCH_SIZE, SCORE_STRIDE, SUMS_SIZE, TILE_LIMIT, ITEM = range(32, 38)  # ITEM: bytes of a cached number
QKV_START = 38
# What stands around the layers (kernels.values.Ends); TOKENS is 0 where only layers run.
TOKENS, EMBEDDING, EMBEDDING_ITEM, VOCABULARY, LAST_NORM, LAST_EPS, HEAD, HEAD_FORM = range(39, 47)
EMBEDDING_SCALE = 47
LOGIT_ROWS, LOGIT_COUNT, LAST_HIDDEN, LOGITS = range(48, 52)  # LOGIT_ROWS is 0 where every row has logits
KEPT = 52  # which rows' features somebody wants, 0 for all
WINDOW_SLOTS, WINDOW_TABLE = 53, 54  # of layers with a window, 0 where these have no pages of their own
FRAME_WORDS = 55
# Words of a layer's descriptor (kernels.values.LayerWeights) and of a cache's (LayerCache).
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, EPS, INPUT_NORM, Q_NORM, K_NORM, POST_NORM, BIAS = range(11)
W_QKV, W_O, W_GATE_UP, W_DOWN = range(11, 19, 2)  # the word after each: the form of its panels
# 0 where a layer has none: norms of what its halves add, angles of its own. WINDOW 0: it sees everything before it.
ATTENTION_NORM, FEEDFORWARD_NORM, OWN_COS, OWN_SIN, ACTIVATION, WINDOW, SCORE_SCALE = range(19, 26)
CACHE_K, CACHE_V, CACHE_PAGES, CACHE_HEADS, CACHE_HEAD_DIM, CACHE_ITEM = range(6)

STAGES_PER_LAYER = 11
STAGES_AROUND = 4  # the first, the last layer's output, the last norm, the vocabulary head
SPILL = 8192  # bytes at the head of a worker's scratch: a tile, then one head
FEW_ROWS = 16  # up to here every thread normalises all rows for itself, which is cheaper than waiting for another
BAD_POSITION, BAD_PAGE, BAD_SLOT, BAD_LAYER, BAD_TOKEN, BAD_LOGIT_ROW = 1, 2, 3, 4, 5, 6


@native
def word(base, index):
    return load_int(base + 8 * index)


@native
def store_word(base, index, value):
    store_int(base + 8 * index, value)
