# Warnings, sanitizers, ccache and the linker, for every target of ours.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -g1 -DNDEBUG")
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g1")

add_compile_options(-Wall -Wextra -Wno-missing-field-initializers)

find_program(HT_CCACHE ccache)
if(HT_CCACHE)
  # Sloppiness: a precompiled header is otherwise never served from the cache. The folder of a clone and the name of its
  # build folder (build/<name>) are in no object, so that all share the cache: debuggers are told build/release, from the
  # root of the clone.
  add_compile_options(-ffile-prefix-map=${CMAKE_SOURCE_DIR}=. -ffile-prefix-map=${CMAKE_BINARY_DIR}=./build/release)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
      CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
      CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=true ${HT_CCACHE})
endif()

find_program(HT_MOLD mold)
if(HT_MOLD)
  add_link_options(-fuse-ld=mold)
endif()

if(HT_SANITIZE)
  add_compile_options(-fsanitize=${HT_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${HT_SANITIZE})
endif()
if(HT_FUZZ)
  # clang 14 cannot emit coroutines with it ("Cannot represent a difference across sections").
  add_compile_options(-fno-sanitize=function)
endif()
