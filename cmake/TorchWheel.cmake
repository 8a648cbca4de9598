# libtorch from the PyPI wheel, linked by hand: find_package(Torch) of a CUDA wheel wants a whole toolkit.
# HT_TORCH_DIR is the `torch` package directory; torch 2.11.0 with its cudart and cupti wheels beside it is enough.
if(NOT EXISTS ${HT_TORCH_DIR}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "no libtorch in HT_TORCH_DIR=${HT_TORCH_DIR}: run `make setup`, or configure with "
                      "-DHT_BUILD_ENGINE=OFF to build the server alone")
endif()
add_library(torch_wheel INTERFACE)
add_library(Torch::cpu ALIAS torch_wheel)
target_include_directories(torch_wheel SYSTEM INTERFACE ${HT_TORCH_DIR}/include)
target_link_directories(torch_wheel INTERFACE ${HT_TORCH_DIR}/lib)
target_link_libraries(torch_wheel INTERFACE torch_cpu c10)
# Tests and tools of the build tree find the wheel by rpath; the installed worker gets LD_LIBRARY_PATH from the launcher.
if(NOT SKBUILD)
  target_link_options(torch_wheel INTERFACE -Wl,-rpath,${HT_TORCH_DIR}/lib)
endif()
