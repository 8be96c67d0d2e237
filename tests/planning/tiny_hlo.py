"""Programs as XLA writes them, small."""

MESH = {'data': 2, 'fsdp': 4, 'context': 1, 'tensor': 1}

# 3 layers, in a loop that states nothing: each gathers a weight over fsdp (devices 0 to 3, 4 to 7) in bf16, and scatters a
# gradient by a fusion around an all-reduce. Then a loop whose length is data, a sum over data (0 and 4), a padded part that
# is summed, two asynchronous gathers and a permute.
TPU = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1.clone (input: f32[16,32]) -> f32[4,32] {
  %input = f32[16,32]{1,0} parameter(0)
  %all-reduce.7 = f32[16,32]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[4,32]{1,0} dynamic-slice(%all-reduce.7, %input), dynamic_slice_sizes={4,32}
}

%started (p: bf16[4,32]) -> (bf16[4,32], bf16[16,32]) {
  %p = bf16[4,32]{1,0} parameter(0)
  %all-gather.3 = bf16[16,32]{1,0} all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %start = (bf16[4,32]{1,0}, bf16[16,32]{1,0}) custom-call(%all-gather.3), custom_call_target="AsyncCollectiveStart"
}

%finished (p.1: bf16[4,32]) -> bf16[16,32] {
  %p.1 = bf16[4,32]{1,0} parameter(0)
  %all-gather.4 = bf16[16,32]{1,0} all-gather(%p.1), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = bf16[16,32]{1,0} custom-call(%all-gather.4), custom_call_target="AsyncCollectiveDone"
}

%condition (state: (s32[], f32[16,32])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[16,32]{1,0}) parameter(0)
  %three = s32[]{:T(128)} constant(3), backend_config={"flag_configs":[]}
  %index = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%index, %three), direction=LT
}

%body (state.1: (s32[], f32[16,32])) -> (s32[], f32[16,32]) {
  %state.1 = (s32[]{:T(128)}, f32[16,32]{1,0}, /*index=2*/bf16[4,32]{1,0}) parameter(0)
  %part = bf16[4,32]{1,0} get-tuple-element(%state.1), index=2
  %all-gather.1 = bf16[16,32]{1,0} all-gather(%part), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}
  %big = f32[16,32]{1,0} get-tuple-element(%state.1), index=1
  %fusion.1 = f32[4,32]{1,0} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1.clone
  ROOT %next = (s32[], f32[16,32]{1,0}) tuple(%part, %fusion.1)
}

%data_condition (state.2: (s32[], s32[])) -> pred[] {
  %state.2 = (s32[], s32[]) parameter(0)
  %now = s32[] get-tuple-element(%state.2), index=0
  %end = s32[] get-tuple-element(%state.2), index=1
  ROOT %less.1 = pred[] compare(%now, %end), direction=LT
}

%data_body (state.3: (s32[], s32[])) -> (s32[], s32[]) {
  %state.3 = (s32[], s32[]) parameter(0)
  %x = f32[64]{0} get-tuple-element(%state.3), index=0
  ROOT %all-reduce.9 = f32[64]{0} all-reduce(%x), channel_id=5, replica_groups={}, to_apply=%add
}

ENTRY %main.9_spmd (param: f32[8,16]) -> f32[] {
  %param = f32[8,16]{1,0} parameter(0)
  %zero = bf16[64]{0} constant({...})
  %zeros = bf16[64]{0} broadcast(%zero), dimensions={}
  %piece = bf16[16]{0} parameter(1)
  %padded = bf16[64]{0} dynamic-update-slice(%zeros, %piece, %piece)
  %turned = bf16[64]{0} bitcast(%padded)
  %whole = f32[64]{0} parameter(2)
  %all-reduce.2 = (bf16[64]{0}, f32[64]{0}) all-reduce(%turned, %whole), replica_groups=[2,4]<=[8], to_apply=%add
  %while.1 = (s32[], f32[16,32]{1,0}) while(%param), condition=%condition, body=%body
  %while.2 = (s32[], s32[]) while(%param), condition=%data_condition, body=%data_body
  %all-reduce.3 = f32[10]{0} all-reduce(%param), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}
  %fusion.3 = (bf16[4,32]{1,0}, bf16[16,32]{1,0}) fusion(%piece), kind=kCustom, calls=%started
  %fusion.4 = bf16[16,32]{1,0} fusion(%fusion.3), kind=kCustom, calls=%finished
  %gathering = ((f32[2]{0}, s32[1]{0}), (f32[8]{0}, s32[4]{0})) all-gather-start(%whole, %piece), replica_groups=[2,4]<=[8]
  %permute = f32[100]{0} collective-permute(%whole), channel_id=8, source_target_pairs={{0,0},{1,2},{2,1}}
  %sent = (f32[25]{0}, u32[], token[]) send(%whole, %token), frontend_attributes={_xla_megascale_target="{1,2}x{0:3}"}
  %alone = f32[1000]{0} all-reduce(%whole), replica_groups={{0},{1}}, to_apply=%add
  ROOT %result = f32[] reduce(%param), to_apply=%add
}
"""

REPORT = """Memory Space: default (color=0)
Total bytes: 35751199232 (33.30GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
Memory Space: vmem (color=1)
Total bytes: 133939200 (127.73MiB)
"""

ASSIGNMENT = """BufferAssignment:
allocation 0: size 96, parameter 0, shape |bf16[2,3,4,2]| at ShapeIndex {}:
 value: <1 param.1 @0> (size=96,offset=0): bf16[2,3,4,2]{3,2,1,0:T(8,128)(2,1)}
allocation 5: size 4096, preallocated-temp:
 value: <7 while.1{2} (phi) @0> (size=96,offset=512): bf16[2,3,4,2]{3,2,1,0:T(8,128)(2,1)}
 value: <8 copy.2 @0> (size=96,offset=512): bf16[2,3,4,2]{3,2,1,0:T(8,128)(2,1)}
 value: <9 copy.3 @0> (size=96,offset=1024): bf16[2,3,4,2]{3,0,2,1:T(8,128)(2,1)}
 value: <10 near.4 @1> (size=96,offset=0): bf16[2,3,4,2]{3,2,1,0:T(8,128)(2,1)S(1)}
 value: <12 sum.5 @0> (size=96,offset=2048): bf16[2,3,4,2]{3,2,1,0:T(8,128)(2,1)}
 value: <11 tuple.1 @0> (size=8,offset=0): (bf16[2,3,4,2]{3,2,1,0}, bf16[2,3,4,2]{3,2,1,0})
"""

# Who made those: the teacher's blocks, and copies of what they made; sum.5 has the same dimensions by chance.
MAKERS = """
  %while.1 = (s32[], f32[16]{0}, bf16[2,3,4,2]{3,2,1,0}) while(%t), metadata={op_name="jit(step)/teacher/blocks/while"}
  %taken = bf16[2,3,4,2]{3,2,1,0} get-tuple-element(%while.1), index=2
  %copy.2 = bf16[2,3,4,2]{3,2,1,0} copy(bf16[2,3,4,2]{3,2,1,0} %taken)
  %copy.3 = bf16[2,3,4,2]{3,0,2,1} copy(%copy.2)
  %near.4 = bf16[2,3,4,2]{3,2,1,0:S(1)} copy(%copy.2)
  %sum.5 = bf16[2,3,4,2]{3,2,1,0} add(%copy.2, %copy.2), metadata={op_name="jit(step)/decoder/add"}
"""

LIVE = """HloLiveRange (max 50):
  InstructionSequence:
    0:param.1
  BufferLiveRange:
    param.1{}:0-2
    while.1{2}:5-9
    copy.2{}:9-12
    copy.3{}:11-20
    near.4{}:0-50
    sum.5{}:0-50
  Live ranges at 12 (peak):
    copy.2{}: 96 bytes (cumulative: 96 bytes)
    while.1{1}: 64 bytes (cumulative: 160 bytes)
  Stack trace breakdown for peak usage: 160 bytes
"""
