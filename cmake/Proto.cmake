# ht_proto(<target> <file.proto>): a static library of protobuf-lite classes, as a system include.
function(ht_proto target file)
  get_filename_component(stem ${file} NAME_WE)
  set(dir ${CMAKE_BINARY_DIR}/proto)
  file(MAKE_DIRECTORY ${dir})
  add_custom_command(
    OUTPUT ${dir}/${stem}.pb.h ${dir}/${stem}.pb.cc
    COMMAND protobuf::protoc --cpp_out=lite:${dir} -I ${CMAKE_SOURCE_DIR}/proto ${CMAKE_SOURCE_DIR}/proto/${file}
    DEPENDS ${CMAKE_SOURCE_DIR}/proto/${file}
    VERBATIM)
  add_library(${target} STATIC ${dir}/${stem}.pb.cc ${dir}/${stem}.pb.h)
  target_include_directories(${target} SYSTEM PUBLIC ${dir})
  target_compile_options(${target} PRIVATE -w)
  target_link_libraries(${target} PUBLIC protobuf::libprotobuf-lite)
endfunction()

# ht_proto_descriptors(<file.proto> <name>): the file's descriptors beside the programs, for readers that are not C++.
function(ht_proto_descriptors file name)
  set(out ${CMAKE_RUNTIME_OUTPUT_DIRECTORY}/${name})
  add_custom_command(
    OUTPUT ${out}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_RUNTIME_OUTPUT_DIRECTORY}
    COMMAND protobuf::protoc --descriptor_set_out=${out} --include_imports -I ${CMAKE_SOURCE_DIR}/proto
            ${CMAKE_SOURCE_DIR}/proto/${file}
    DEPENDS ${CMAKE_SOURCE_DIR}/proto/${file}
    VERBATIM)
  add_custom_target(${name} ALL DEPENDS ${out})
endfunction()
