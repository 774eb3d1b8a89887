// Runs an AOTInductor package of a model with fused_rnn's layers, without Python.
//
//   run_package libfused_rnn.so model.pt2 inputs.pt outputs.pt
//
// inputs.pt is a list of tensors, as torch.save writes it, and outputs.pt a tuple, as torch.load reads it. README.md in
// this folder says how to make the library and the package.
#include <dlfcn.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/core/ivalue.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace {

// Loading the library is all it takes: it registers the operators with torch.
void load_operators(const std::string& path) {
  if (!dlopen(path.c_str(), RTLD_NOW)) throw std::runtime_error(dlerror());
}

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

void write_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  const std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())))
    throw std::runtime_error("cannot write " + path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: run_package libfused_rnn.so model.pt2 inputs.pt outputs.pt\n";
    return 2;
  }
  try {
    load_operators(argv[1]);
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    write_tensors(argv[4], model.run(read_tensors(argv[3])));
  } catch (const std::exception& error) {
    std::cerr << "run_package: " << error.what() << '\n';
    return 1;
  }
}
