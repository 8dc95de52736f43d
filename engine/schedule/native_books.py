"""Columns of the scheduler's books: what it keeps of each running request, one row a request."""

# Whole numbers.
BAND = 0  # whose reliability it shares
METHOD = 1  # its calibration, −1 for none
CAP = 2  # draft tokens it may ever use: γ and its own wish
END = 3  # tokens at which max_tokens or the context ends it
MODE = 4  # OFF, FIXED, THRESHOLD or AUTO
TOKENS = 5  # of a FIXED wish, −1 without one
FREE = 6  # 1: coupled or greedy, its text is the same under every schedule
BLOCKS_SEEN = 7  # drafted so far
LAST_DRAFT = 8  # round of the last one, −1 before the first
DRAFTING = 9  # 1: it drafts, by the last review
GALLERY = 10  # its entry there, counted from the first ever; −1 before its first block
LOOKS = 11  # blocks that it is still to draft, whether that pays or not
WHOLE = 12
# Real numbers.
WEIGHT = 0  # what one of its tokens counts
THRESHOLD = 1  # of a THRESHOLD wish, NaN without one
CHECKED = 2  # drafted tokens that met the target, fading; begins as a mild guess
KEPT = 3  # of those, accepted
FACTOR = 4  # the weight that its priority gives
LEAST_RATE = 5  # tokens a second that it asks for
RATE = 6  # that it gets, fading; 0 until two rounds are seen
LAST_S = 7  # clock of its last round
CERTAINTY = 8  # the target's largest probability, averaged over about the last ten rounds
CERTAIN = 9  # rounds that it is known of
REAL = 10

BANDS = 7  # greedy, then three of temperature under each way to verify
OFF, FIXED, AUTO = 0, 1, 3  # modes
THRESHOLD_MODE = 2
BLOCKS = 16  # blocks by which a request is judged
GALLERY_REQUESTS, GALLERY_BLOCKS = 24, 8  # the last requests of a band that drafted, and blocks kept of each
CLASS_BLOCKS = 64  # blocks of its class, by which those without a past are judged
LEVELS = 5  # classes of a band: certainty unknown, then by how certain the target is

# The gate's memory.
ROUND = 0  # now
REVIEW_AT = 1  # round of the next decision
OPEN = 2  # 1: drafting pays, by the last one
ALLOWANCE_S = 3  # seconds that probes may take
PRICE = 4  # weighted tokens that a second is worth
LENGTH = 5  # slots that a block gets
SINCE_WHOLE = 6  # blocks since the last that got all
DECAY = 7  # how a survival usually compares with the one before it, over all positions
SCOUTS_S = 8  # seconds that scouts may take
RETURNS = 9  # place of who had better begin again, −1 for nobody
SINCE_PLAIN = 10  # rounds since the last in which nobody drafted
CHECK_AFTER = 11  # as many, and one must be without drafts
CHECKING = 12  # rounds without drafts to come, this one included, of which the last shows what they take
BESIDE = 13  # requests that drafted in the last round, because that paid
KEEPING_S = 14  # seconds that keeping features takes in a round in which nobody drafts, where anybody is followed
LOOK_S = 15  # seconds by which a look at somebody has made a round longer
PLAIN_S = 16  # seconds of this round without drafts, as foretold
LOADS = 12
WENT_ON = 17  # by the load's power of two: share of the followed that drafted beyond their looks, fading
TRIALS_S = WENT_ON + LOADS  # likewise: seconds that following whole batches may take
ON_TRIAL = TRIALS_S + LOADS  # likewise: 1 while it does
UNPAID = ON_TRIAL + LOADS  # likewise: tokens since drafting last paid
OUTLOOKS, OUTLOOK = UNPAID + LOADS, 4  # of each band: tokens, until which round, of how many tokens and blocks beside
MEMORY = OUTLOOKS + OUTLOOK * BANDS
