# libht_cuda.so is built where nvcc is, from kernels/cuda (raw pointers, no torch headers: seconds a file) and
# src/engine/device/cuda. CMake's own CUDA language is not enabled: it wants to link a program for a toolkit's defaults.
find_program(HT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin
             DOC "The CUDA compiler; none: libht_cuda.so is not built")
set(HT_CUDA_TARGETS
    # 8.x, and as PTX what is newer than this list; 9.0: H100, H200; 10.0: B200
    "-gencode=arch=compute_80,code=[sm_80,compute_80]" "-gencode=arch=compute_90a,code=sm_90a"
    "-gencode=arch=compute_100a,code=sm_100a")
if(HT_SANITIZE)
  set(HT_CUDA OFF)
  message(STATUS "CUDA: SKIPPED, libht_cuda.so is not built with sanitizers")
elseif(HT_NVCC)
  set(HT_CUDA ON)
  message(STATUS "CUDA: ${HT_NVCC}")
  get_filename_component(HT_CUDA_ROOT "${HT_NVCC}" REALPATH)
  get_filename_component(HT_CUDA_ROOT "${HT_CUDA_ROOT}/../.." ABSOLUTE)
else()
  set(HT_CUDA OFF)
  message(STATUS "CUDA: SKIPPED, libht_cuda.so is not built: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
endif()

# Compiles a .cu file; `out` receives the object. What ptxas says of registers and spills goes to <object>.ptxas.
function(ht_cuda_object source out)
  get_filename_component(name ${source} NAME_WE)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${name}.cu.o)
  string(JOIN "' '" flags -std=c++20 -O3 ${HT_CUDA_TARGETS} -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas=-v -MD -MF
         ${object}.d -MT ${object} -I${CMAKE_SOURCE_DIR} -I${CMAKE_SOURCE_DIR}/src)
  add_custom_command(
    OUTPUT ${object} ${object}.ptxas
    COMMAND sh -c
            "'${HT_NVCC}' '${flags}' -c '${source}' -o '${object}' 2>'${object}.ptxas' || { cat '${object}.ptxas' >&2; exit 1; }"
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "nvcc ${name}.cu"
    VERBATIM)
  set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  set(${out} ${object} PARENT_SCOPE)
endfunction()
