// Keeping freed memory in the process: the page faults of fresh memory cost a training step more than its norms do.
#pragma once

#include <cstddef>

namespace peak {

// Makes malloc keep what is freed, for the whole process and for good, and asks for huge pages for the first `bytes`
// of it. Returns false where the C library has no such settings.
bool KeepPages(std::size_t bytes);

}  // namespace peak
