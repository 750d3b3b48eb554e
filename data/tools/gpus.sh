#!/usr/bin/env bash
# Print the number of GPUs that a process started here can use: those that nvidia-smi lists, or as
# many of them as CUDA_VISIBLE_DEVICES names, up to the first name that CUDA does not know. Errors of
# nvidia-smi and "No devices were found" are no GPUs, nor are parts of one (MIG): a process can use
# one part, which then counts as its GPU.
listed=$(timeout 60 nvidia-smi -L 2>/dev/null)
gpus=$(grep -c '^GPU [0-9]*:' <<< "$listed")
if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
  echo "$gpus"
  exit
fi
visible=0
for name in ${CUDA_VISIBLE_DEVICES//,/ }; do
  uuid=$name
  if [[ $name == MIG-GPU-*/* ]]; then uuid=${name#MIG-} uuid=${uuid%%/*}; fi  # drivers before 470
  if [[ $name == *[!0-9]* ]] && ! grep -q "UUID: $uuid" <<< "$listed"; then break; fi
  if [ "$visible" -lt "$gpus" ]; then visible=$((visible + 1)); fi
  if [[ $name == MIG-* ]]; then break; fi
done
echo "$visible"
