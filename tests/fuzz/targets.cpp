#include "targets.h"

#include <array>
#include <stdexcept>

namespace ht::fuzz {

std::span<const Target> targets() {
  static constexpr std::array all{
      Target{"safetensors", safetensors},       Target{"model_config", model_config},
      Target{"worker_frames", worker_frames},   Target{"forward_backward", forward_backward},
      Target{"json_bodies", json_bodies},       Target{"zstd_bodies", zstd_bodies},
      Target{"tinker_path", tinker_path},       Target{"journal_file", journal_file},
      Target{"journal_damage", journal_damage}, Target{"journal_record", journal_record},
  };
  return all;
}

void require(bool promise, const char* text) {
  if (!promise) throw std::logic_error(text);
}

}  // namespace ht::fuzz
