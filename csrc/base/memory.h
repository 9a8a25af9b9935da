// Keeping freed memory in the process: the page faults of fresh memory cost a training step more than its norms do.
// Workspaces. And when to store past the caches.
#pragma once

#include <cstddef>
#include <cstdint>

namespace peak {

// Makes malloc keep what is freed, for the whole process and for good, and asks for huge pages for the first `bytes`
// of it. Returns false where the C library has no such settings.
bool KeepPages(std::size_t bytes);

// Whether stores to an output of `bytes` in rows of `row_bytes` should go past the caches: an ordinary store reads its
// line first, which is a third of a copy's traffic, but leaves it where the next kernel finds it. True where the output
// would push most of itself out of the last-level cache anyway, and rows consist of whole lines.
bool GoPast(const void* out, int64_t bytes, int64_t row_bytes);

// Memory kept between calls on a thread, uninitialised, 64-byte aligned, valid until the next call on the thread: fresh
// pages cost more than the packing that fills them.
void* Workspace(int64_t bytes);

// Asks for huge pages under memory that is not touched yet: a stream of reads is a third faster where it crosses fewer
// of their borders.
void AskHugePages(void* begin, int64_t bytes);

}  // namespace peak
