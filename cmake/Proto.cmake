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
