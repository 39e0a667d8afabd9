import sys, time; sys.path.insert(0, "tests/runtime")
import torch
from fusec.runtime.engine import Engine
from fusec.runtime.scheduler import Sequence
from fusec.runtime.sampling import SamplingParams
class Thin:
    dtype=torch.float32; supports_graphs=True; cache_bytes_per_token=4
    def __init__(self, v): self.vocab_size=v; self.device=torch.device("cuda"); self.l=torch.randn(256,v,device="cuda")
    def allocate_cache(self,*a): pass
    def forward(self,b): return self.l[:len(b.rows)] if not b.max_query>1 else self.l[b.rows.long()%256]
for name,kw in (("greedy",dict(temperature=0)),("plain",{}),("filtered",dict(top_p=.9,top_k=50)),("penal",dict(temperature=0,repetition_penalty=1.1)),("logprobs",dict(temperature=0,logprobs=5))):
  for B in (1,64,256):
    e=Engine(Thin(128256),num_blocks=40000,max_model_len=4096)
    seqs=[Sequence([1,2,3],SamplingParams(max_tokens=600,**kw),500,{},seed=i) for i in range(B)]
    for s in seqs: e.add(s)
    for _ in range(40): e.step()
    torch.cuda.synchronize(); t=time.perf_counter()
    for _ in range(100): e.step()
    torch.cuda.synchronize(); t=(time.perf_counter()-t)/100
    if B in (1,) :
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            for _ in range(10): e.step()
            torch.cuda.synchronize()
        ev=sorted(p.key_averages(),key=lambda e:-e.device_time_total)[:12]
        print(name,B,"kernels/step",sum(e.count for e in p.key_averages())/10, "device us/step", round(sum(e.device_time_total for e in p.key_averages())/10,1))
        if name in("greedy","plain"):
            for x in ev: print("   ",x.key[:90],x.count/10,round(x.device_time_total/10,2))
    print(name,B,"us/step",round(t*1e6,1), flush=True)
    del e; torch.cuda.empty_cache()
