// Whether AMX's tile instructions can be used.
#pragma once

#include <string>

namespace kvik {

// Why not, or nothing where they can. Asked first, it asks the system to let this process use the tile registers, and
// multiplies two small matrices: what the instructions give must be what their emulation gives.
const std::string &amx_obstacle();

} // namespace kvik
